"""Predicted beside measured, as a card of the page and as lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from turbopump.core.units import human_seconds
from turbopump.reporting import html
from turbopump.reporting.html import Html, tag
from turbopump.reporting.plots import Table
from turbopump.reporting.predicted import Part, Predicted
from turbopump.reporting.words import KIND_NAMES, percent


def predicted_card(predicted: Predicted | None) -> Html:
    """The tables of step and run; why there are none, where nothing was predicted."""
    if predicted is None:
        return Html()
    if predicted.problem:
        texts = [tag("p", predicted.problem, ". ", html.prose(predicted.how), ".", class_="muted")]
    else:
        texts = [tag("p", line) for line in predicted_lines(predicted)]
        texts += [_table(parts, caption) for parts, caption in ((predicted.step, "a step"), (predicted.run, "the run"))
                  if parts]  # fmt: skip
        texts.append(tag("p", _rests_on(predicted), class_="muted"))
    return tag("div", tag("h3", "Predicted and measured"), *texts, class_="card", style="margin-top:16px")


def _table(parts: Sequence[Part], caption: str) -> Html:
    rows = [
        [KIND_NAMES.get(part.name, part.name), human_seconds(part.predicted_s), band(part),
         human_seconds(part.measured_s), _difference(part), "outside" if part.outside else ""]
        for part in parts if part.predicted_s or part.measured_s
    ]  # fmt: skip
    header = [f"part of {caption}", "predicted", "80 % band", "measured", "difference", "band"]
    return html.table(Table(header, rows), caption=f"Predicted and measured, {caption}")


def band(part: Part) -> str:
    return f"{human_seconds(part.low_s)} to {human_seconds(part.high_s)}"


def _difference(part: Part) -> str:
    if not part.predicted_s:
        return "not expected"
    share = part.measured_s / part.predicted_s - 1.0
    return f"{'+' if share >= 0 else '−'}{percent(abs(share))}"


def _rests_on(predicted: Predicted) -> str:
    share = predicted.measured_share
    known = f"{percent(share)} of its operations' time is measured exactly" if share is not None else ""
    by = ", ".join(predicted.calibrated_by)
    learned = f"calibrated by {by}" if by else "not calibrated by runs (`turbopump plan --calibrate RUN`)"
    machine = f"by the machine file of {predicted.machine}" if predicted.machine else ""
    return "; ".join(text for text in (machine, known, learned, *predicted.notes) if text) + "."


def predicted_lines(predicted: Predicted | None) -> Iterator[str]:
    """For terminal and page: the step, then each part that differs by more than its band."""
    if predicted is None:
        return
    if predicted.problem:
        yield f"{predicted.problem}; {predicted.how}"
        return
    for parts, name in ((predicted.step, "a step"), (predicted.run, "the run")):
        for part in parts:
            if part.name == "total":
                where = "outside" if part.outside else "within"
                yield (f"predicted: {name} takes {human_seconds(part.predicted_s)} ({band(part)}); measured: "
                       f"{human_seconds(part.measured_s)}, {where} the band")  # fmt: skip
            elif part.differs:
                yield (f"differs: {KIND_NAMES.get(part.name, part.name)} of {name}: "
                       f"{human_seconds(part.measured_s)} measured, {band(part)} predicted")  # fmt: skip
