"""`ridfr evaluate folder`: restore and measure a data set, in one process or in several under accelerate."""

from pathlib import Path

from ..face_model import face_model_of
from ..training.files import write_whole
from .folder import EvaluationError, Task, find_tasks, load_pipeline, only_square, restore_all
from .measure import ODD, Judge, Row, averages, check_judge, draw_sheet, intervals, summary, write_csv


def evaluate_folder(data: Path, out: Path, references: int, face_model: str, judge: str, batch: int,
                    pipeline: dict | None, seeds: int = 1) -> str:
    """Restore every LQ face of `data` once with each of the first `references` photos, measure, and write into `out`.

    Args:
        references: 0 restores blindly.
        face_model, judge: see `face_model_of`; the one that conditions, and another.
        pipeline: arguments of `load_pipeline`, or None if the restored faces lie in `out` already.
        seeds: how often each face is restored with each photo, from other noise.
    Returns the summary (empty in all processes but the first). Raises EvaluationError: nothing to restore, a judge
    that is not independent, restored faces that should be there and are not.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    conditions, judges = face_model_of(face_model), face_model_of(judge)
    check_judge(judges, conditions)
    tasks, unusable = find_tasks(data, references, conditions.detector, seeds)
    if pipeline is None:
        check_restored(tasks, out)
    else:
        tasks = only_square(tasks, unusable)
    with state.split_between_processes(tasks) as mine:
        if pipeline is not None:
            loaded = load_pipeline(**pipeline | {"face_model": conditions}, device=state.device)
            restore_all(loaded, mine, out, batch)
        measured = Judge(judges, state.device)
        rows = [measured.row(task, task.restored(out)) for task in mine]
        faces = {(task.person, task.lq.stem): task for task in mine if task.truth}
        degraded = [measured.row(task, task.lq) for task in faces.values()]
    rows, degraded = gather_object(rows), gather_object(degraded)
    if not state.is_main_process:
        return ""
    left_out = [f"Left out: {path.relative_to(data)}: {reason}." for path, reason in unusable.items()]
    how = "restored elsewhere" if pipeline is None else ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in {**pipeline, "face_model": face_model}.items() if value)
    return write(measured, tasks, rows, degraded, out, data.name, [*left_out, f"How: {how}."])


def check_restored(tasks: list[Task], out: Path) -> None:
    if missing := [path for task in tasks if not (path := task.restored(out)).is_file()]:
        raise EvaluationError(f"{len(missing)} of {len(tasks)} restored faces are not there, the first of them "
                              f"'{missing[0]}': restore them, or leave out --measure-only.")


def write(measured: Judge, tasks: list[Task], rows: list[Row], degraded: list[Row], out: Path, name: str,
          notes: list[str]) -> str:
    """Write images.csv, summary.md and sheet.png; returns the summary.

    rows: of the restored faces, in the order of the tasks. degraded: of the LQ faces that have a truth.
    """
    degraded = list({(row.person, row.image): row for row in degraded}.values())
    results = {"degraded": averages(degraded)} if degraded else {}
    method = "restored" if tasks[0].reference else "restored blindly"
    results[method] = averages(rows)
    spreads = {method: intervals(rows)}
    with_truth = [task for task in tasks if task.truth]
    if "FID" in measured.metrics and with_truth:
        results[method]["FID"] = measured.fid([t.restored(out) for t in with_truth], [t.truth for t in with_truth])
    draw_sheet(tasks, rows, out, f"{name}: {len(rows)} restorations")
    write_csv(rows, out / "images.csv")
    judge = measured.face_model
    notes = [f"Restorations: {len(rows)}, of faces: {len({(r.person, r.image) for r in rows})}, of people: "
             f"{len({r.person for r in rows})}. Judge: {judge.name} ({judge.digest[:8]}).", *notes]
    if lost := sum(row.embedding is None for row in rows):
        notes.append(f"The judge found no face in {lost} of {len(rows)} restorations; they count in the other columns.")
    if measured.absent:
        absent = (f"{', '.join(names)}, {reason}" for reason, names in measured.absent.items())
        notes.append(f"Absent: {'; '.join(absent)}.")
    if spreads[method]:
        notes.append("In brackets: 95 % bootstrap intervals over people.")
    text = summary(results, notes, spreads)
    write_whole(out / "summary.md", lambda partial: partial.write_text(text, encoding="utf-8", errors=ODD))
    return text
