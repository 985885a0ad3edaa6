"""What makes the test bed and drives it: `python3 -m tools help`. Never shipped with the pack."""
