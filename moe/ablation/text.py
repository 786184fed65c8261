"""The report of a sweep in words: Markdown."""

import math
from collections.abc import Iterator, Mapping

from moe.ablation.command import Commands
from moe.ablation.markdown import NOTHING, code, interval, number, scaled, signed, table
from moe.ablation.scaling import BATCHES, scaling
from moe.ablation.statistics import CONFIDENCE, Interval
from moe.ablation.summary import SAME_COMPUTE, RowSummary, Sweep


def quality_table(sweep: Sweep) -> str:
    """Loss of every row and its difference to the baseline."""
    header = [
        "row",
        "seeds",
        "validation loss",
        "bits per byte",
        "difference to baseline",
        "TOST p",
        "verdict",
    ]
    return table(header, [_quality(sweep, summary) for summary in sweep.rows])


def _quality(sweep: Sweep, summary: RowSummary) -> list[str]:
    name = _name(sweep, summary)
    cells = [
        name,
        f"{summary.loss.count} of {len(summary.results)}",
        interval(summary.loss),
        interval(summary.bits_per_byte),
    ]
    comparison = summary.comparison
    if comparison is None:
        return [*cells, NOTHING, NOTHING, "baseline"]
    if not comparison.difference.count:
        return [*cells, NOTHING, NOTHING, NOTHING]
    within = comparison.verdict in ("better", "worse") and comparison.equivalence < 1 - CONFIDENCE
    verdict = comparison.verdict + (", within the margin" if within else "")
    return [*cells, signed(comparison.difference), number(comparison.equivalence, ".3f"), verdict]


def report_text(sweep: Sweep, commands: Commands, captions: Mapping[str, str]) -> Iterator[str]:
    """The report in Markdown, a block at a time.

    Args:
        sweep: as it stands.
        commands: what writes the command of each row.
        captions: of every picture that there is, by its file name.
    """
    ablation, base = sweep.ablation, sweep.ablation.base
    yield f"# {ablation.name}\n"
    if sweep.description:
        yield f"```text\n{sweep.description.replace('```', '')}\n```\n"
    yield from _state(sweep)

    tokens = base.train.steps * base.train.batch_size * base.data.sequence_length
    machines = sorted({m["devices"] for m in (r.machine for r in sweep.results) if "devices" in m})
    commits = sorted({m["commit"] for m in (r.machine for r in sweep.results) if "commit" in m})
    axes = ", ".join(f"{axis.name} ({len(axis.choices)})" for axis in ablation.axes)
    yield f"- Axes: {axes}; seeds {', '.join(map(str, ablation.seeds))}"
    yield f"- Each run: {base.train.steps:,} steps, {tokens:,} tokens (unless its row says otherwise)"
    yield f"- Baseline: `{ablation.baseline_name}`; margin of equivalence: {ablation.margin:g} nats per token"
    if machines:
        yield f"- Trained on {'; '.join(machines)}; commit {', '.join(commits)}"

    yield "\n## Quality\n"
    yield quality_table(sweep) + "\n"
    yield from _picture(captions, "differences.png")
    yield from _scaling(sweep, captions)
    yield "## Routing and compute\n"
    yield _compute_table(sweep) + "\n"
    yield from _footnotes(sweep)
    for name in ("compute.png", "loss.png", "gap.png", "balance.png"):
        yield from _picture(captions, name)
    yield from _left_out(sweep)
    yield from _commands(sweep, commands)
    yield from _method(sweep)


def _state(sweep: Sweep) -> Iterator[str]:
    if sweep.complete:
        yield f"All runs are finished: {len(sweep.results)}.\n"
        return
    count = {
        status: sum(result.status == status for result in sweep.results)
        for status in ("finished", "failed", "unfinished", "not started")
    }
    rest = ", ".join(
        f"{number} {status}" for status, number in count.items() if number and status != "finished"
    )
    yield (
        f"> **Partial report**: {count['finished']} of {len(sweep.results)} runs are finished ({rest}). "
        "Numbers are of the finished ones.\n"
    )


def _compute_table(sweep: Sweep) -> str:
    header = [
        "row",
        "MaxVio",
        "dropped",
        "experts per token",
        "parameters",
        "active parameters",
        "active FLOPs per token",
        "against baseline",
        "tokens/s",
        "step time",
    ]
    rows = [
        [
            _name(sweep, row),
            number(row.max_violation.mean, ".2f"),
            number(row.dropped_fraction.mean, ".2%"),
            number(row.experts_per_token.mean, ".2f") + (" †" if row.other_experts else ""),
            scaled(row.compute.total_params),
            scaled(row.compute.active_params),
            scaled(row.compute.forward_flops),
            f"{row.relative_compute - 1:+.1%}",
            scaled(row.tokens_per_second.mean),
            _milliseconds(row.step_seconds.mean),
        ]
        for row in sweep.rows
    ]
    return table(header, rows)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds == seconds else NOTHING


def _scaling(sweep: Sweep, captions: Mapping[str, str]) -> Iterator[str]:
    """Experts and granularity, where the rows ask for them."""
    found = scaling(sweep)
    if not found:
        return
    fit = found.fit
    yield "## Experts and granularity at equal active compute\n"
    yield from _picture(captions, "scaling.png")
    rows = [
        [
            point.name,
            str(point.experts or NOTHING),
            number(point.granularity, "g"),
            number(point.expansion, "g"),
            scaled(point.total_params),
            interval(point.loss),
            number(fit.loss(point.expansion, point.granularity) if point.experts else math.nan, ".4f"),
            _milliseconds(point.step_seconds),
            *(scaled(read) + "B" for read in point.decode_bytes),
        ]
        for point in ([found.dense] if found.dense else []) + list(found.points)
    ]
    header = ["row", "experts E", "granularity G", "expansion R", "parameters", "validation loss", "fitted"]
    header += ["step time", *(f"bytes a token, batch {batch}" for batch in BATCHES)]
    yield table(header, rows) + "\n"
    yield (
        f"ln loss = a + b ln R + c ln G over {fit.of_doubling_experts.count} runs: twice the experts change "
        f"the loss by {_percent(fit.of_doubling_experts)}, experts twice as fine by "
        f"{_percent(fit.of_doubling_granularity)}; R² {fit.explained:.3f}, residual {fit.residual:.2%}. "
        "R = E / G is total over active experts; intervals are of least squares, at 95 %. It speaks of this "
        "active size and length of training (2202.01169 and 2402.07871 have laws over sizes).\n"
    )


def _percent(found: Interval) -> str:
    return f"{found.mean:+.2%} [{found.low:+.2%}, {found.high:+.2%}]"


def _footnotes(sweep: Sweep) -> Iterator[str]:
    if any(row.other_compute for row in sweep.rows):
        yield (
            f"≠ Active FLOPs differ from the baseline's by more than {SAME_COMPUTE:.0%}: this row is not "
            "compared at equal compute.\n"
        )
    for row in sweep.rows:
        if row.other_experts:
            yield (
                f"† `{row.name}`: active parameters and FLOPs count {row.charged_experts:.2f} experts per "
                f"token; {row.experts_per_token.mean:.2f} were measured.\n"
            )


def _left_out(sweep: Sweep) -> Iterator[str]:
    failed = [result for result in sweep.results if result.status == "failed"]
    diverged = [r for r in sweep.results if r.status == "finished" and not math.isfinite(r.loss)]
    if failed or diverged:
        yield "## Failed runs\n"
        yield from (f"- {code(result.run.title)}: {code(result.failure)}" for result in failed)
        yield from (
            f"- {code(r.run.title)}: finished, but its validation loss is not finite" for r in diverged
        )
        yield ""
    if sweep.impossible:
        yield "## Not possible\n"
        yield from (f"- {code(row.name)}: {code(row.reason)}" for row in sweep.impossible)
        yield ""


def _commands(sweep: Sweep, commands: Commands) -> Iterator[str]:
    seed = sweep.ablation.seeds[0]
    yield "## Commands\n"
    yield f"What trains one run of each row, seed {seed}; for another one change `--seed` and the name.\n"
    for row in sweep.rows:
        command = commands.of(row.results[0].run.experiment)
        found = (
            command or f"no config file to start from; all fields stand in {row.name}/seed{seed}/config.json"
        )
        yield f"`{row.name}`\n\n```sh\n{found}\n```\n"


def _method(sweep: Sweep) -> Iterator[str]:
    others = len(sweep.rows) - 1
    yield "## How to read this\n"
    yield (
        "- Loss and bits per byte are those after the last step, on all validation text. ± and [ ] are 95 % "
        "t-intervals over seeds: they speak of other seeds, not of other data, sizes or learning rates."
    )
    yield (
        "- The difference to the baseline is taken seed by seed (a seed sets data order, parameters and "
        "routing noise), its interval over those pairs. *better* and *worse*: the interval excludes zero."
    )
    yield (
        f"- *equivalent*: two one-sided t-tests refuse a difference of {sweep.ablation.margin:g} or more in "
        "either direction (TOST, p < 0.05). *undecided*: neither shown; more seeds would tell."
    )
    yield (
        f"- Nothing is corrected for making {others} comparisons: at 95 %, about one in twenty stands out by "
        "chance."
    )
    yield (
        "- MaxVio, dropped assignments and experts per token are means over layers and over the last tenth "
        "of the training log. Active FLOPs are those of the forward pass, training takes three times as "
        "many; tokens/s is the median over the log, without compilation, evaluation and checkpoints.\n"
    )


def _picture(captions: Mapping[str, str], name: str) -> Iterator[str]:
    if name in captions:
        yield f"![{captions[name]}]({name})\n\n*{captions[name]}*\n"


def _name(sweep: Sweep, summary: RowSummary) -> str:
    if summary.name == sweep.ablation.baseline_name:
        return f"**{summary.name}**"
    return summary.name + (" ≠" if summary.other_compute else "")
