# Thin names for `python3 -m tools`, which also runs where there is no make (Windows: py -m tools demo).
PYTHON ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo serve doctor test bench lint setup lock clean-cache

help demo serve doctor test bench lint setup lock clean-cache:
	@$(PYTHON) -m tools $@ $(ARGS)
