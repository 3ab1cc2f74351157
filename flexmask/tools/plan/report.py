"""A plan as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexmask.data.trees import empty_thoughts
from flexmask.data.unused import describe_unused
from flexmask.errors import pluralize
from flexmask.model.work import TILE
from flexmask.tools.plan.row_budget import RowBudget
from flexmask.tools.plan.survey import Plan, distribution
from flexmask.tools.table import table

if TYPE_CHECKING:
    from flexmask.tools.plan.estimate import BoundedLayers, Estimate
    from flexmask.tools.plan.measure import Measured

_WAYS = {
    "npass": "N-pass",
    "packed_npass": "packed N-pass",
    "one_render": "one render",
    "single_pass": "single-pass",
}
CHAIN = (
    "chain: one sequence is enough, single pass saves nothing here, what it gives is exact labels"
)


def plan_text(plan: Plan, estimate: Estimate | None = None) -> str:
    """The plan of a file: the gain over other ways, why, its lengths, and what would go wrong."""
    parts = [_gain(plan, estimate), _shape(plan), _rows(plan), _lengths(plan), _mistrained(plan)]
    if plan.overflow is not None:
        parts.append(_over_budget(plan.overflow))
    if plan.unused_keys:
        parts.append(describe_unused(plan.unused_keys))
    if plan.num_bad_lines:
        parts.append(_bad_lines(plan))
    return "\n\n".join(parts)


def estimate_text(estimate: Estimate) -> str:
    """What a model would make of the plan."""
    lines = [
        f"estimate for {estimate.model_type}, {estimate.num_parameters:,} parameters, "
        f"{estimate.dtype}",
        f"  operations, forward + backward   {estimate.npass_flops:.2e} N-pass, "
        f"{estimate.single_pass_flops:.2e} single-pass",
        f"  speed-up over N-pass, packed or not   {estimate.speed_up:.2f} "
        f"({estimate.speed_up_by_tiles:.2f} by visited tiles)",
        f"  weights, gradients, AdamW        {_size(estimate.state_bytes)}",
    ]
    lines.extend(map(_bounded, estimate.bounded_layers))
    if estimate.activation_bytes is None:
        lines.append("  activations                      not known: they depend on the data")
    else:
        sizes = ", ".join(
            f"{_size(size)} {_WAYS[way]}" for way, size in estimate.activation_bytes.items()
        )
        lines.append(f"  activations of the largest row   {sizes}")
    if estimate.shared_activation_bytes is not None:
        lines.append(
            f"  of each of {estimate.sequence_parallel_size} processes".ljust(35)
            + f"{_size(estimate.shared_activation_bytes)} single-pass, with tokens shared"
        )
    return "\n".join(lines)


def measured_text(measured: Measured) -> str:
    """Predictions and measurements side by side."""
    rows = []
    for way, seconds in measured.seconds.items():
        predicted = found = ""
        if way in measured.measured_speed_up:
            low, high = measured.speed_up_range[way]
            predicted = f"{measured.predicted_speed_up[way]:.2f}"
            found = f"{measured.measured_speed_up[way]:.2f} ({low:.2f}-{high:.2f})"
        guess = measured.predicted_saved_bytes[way]
        rows.append(
            (
                _WAYS[way],
                f"{seconds:.3g} s",
                *(predicted, found),
                "-" if guess is None else _size(guess),
                _size(measured.saved_bytes[way]),
            )
        )
    heading = (
        f"measured on {measured.device}: {pluralize(measured.conversations, 'conversation')}, "
        f"random weights, forward + backward, {pluralize(measured.rounds, 'round')}"
    )
    names = ("", "seconds", "speed-up", "", "kept by autograd", "")
    below = ("", "", "predicted", "measured", "predicted", "measured")
    return f"{heading}\n{table([names, below, *rows])}"


def _bounded(kind: BoundedLayers) -> str:
    limits = {"window": kind.window, "chunk": kind.chunk}
    named = ", ".join(f"{name} of {size:,}" for name, size in limits.items() if size is not None)
    named += f" in {pluralize(kind.layers, 'layer')}"
    return (
        f"  {named:<33}{kind.npass_visible_pairs:,} visible pairs "
        f"N-pass, {kind.single_pass_visible_pairs:,} single-pass"
    )


def _gain(plan: Plan, estimate: Estimate | None) -> str:
    """The ways under each other: what they cost, as multiples of the single pass, and miss."""
    wrong = plan.mistrained.one_render
    times = dict.fromkeys(_WAYS, "")
    if estimate is not None:
        times["npass"] = times["packed_npass"] = f"{estimate.speed_up:.2f}"
        times["one_render"] = f"{estimate.speed_up_over_one_render:.2f}"
    single = plan.single_pass.work
    rows: list[Sequence[str]] = [
        ("", "tokens", "ratio", "visible pairs", "ratio", "predicted time", "trained wrongly")
    ]
    for name, way, missed in (
        ("npass", plan.npass, 0),
        ("packed_npass", plan.npass, 0),
        ("one_render", plan.one_render, wrong),
        ("single_pass", plan.single_pass, 0),
    ):
        rows.append(
            (
                _WAYS[name],
                f"{way.work.num_tokens:,}",
                f"{way.work.num_tokens / single.num_tokens:.2f}",
                f"{way.work.num_pairs:,}",
                f"{way.work.num_pairs / single.num_pairs:.2f}",
                times[name] or "1.00",
                f"{missed:,} ({missed / plan.trained_tokens:.1%})" if missed else "nothing",
            )
        )
    if estimate is None:
        rows = [(*row[:5], row[6]) for row in rows]
    return (
        f"{pluralize(plan.conversations, 'conversation')}, {pluralize(plan.samples, 'sample')}, "
        f"{plan.trained_tokens:,} trained tokens\n"
        f"thinking of earlier turns: {plan.thinking}\n\n{table(rows)}"
    )


def _shape(plan: Plan) -> str:
    """How much the conversations branch, and why."""
    lines = [
        f"{pluralize(plan.leaves, 'leaf', 'leaves')} in {pluralize(plan.conversations, 'tree')}"
    ]
    if plan.branches:
        lines[0] += "; branches by cause: "
        lines[0] += ", ".join(f"{name} {number:,}" for name, number in plan.branches.most_common())
    if plan.chains:
        lines.append(f"{CHAIN}: {plan.chains:,} of {pluralize(plan.conversations, 'conversation')}")
    if plan.empty_thoughts:
        lines.append(empty_thoughts(plan.empty_thoughts))
    return "\n".join(lines)


def _rows(plan: Plan) -> str:
    """What rows of one sequence or one conversation bring to a kernel."""
    ways = {"npass": plan.npass, "one_render": plan.one_render, "single_pass": plan.single_pass}
    return table(
        [
            ("", *(_WAYS[name] for name in ways)),
            (f"visited {TILE}x{TILE} tiles", *(f"{w.num_tiles():,}" for w in ways.values())),
            ("tile density", *(f"{way.tile_density:.3f}" for way in ways.values())),
            ("largest row, tokens", *(f"{plan.largest[name]:,}" for name in ways)),
        ]
    )


def _lengths(plan: Plan) -> str:
    rows: list[Sequence[str]] = [("", "lowest", "median", "p95", "highest", "mean")]
    for name, values in (
        ("samples in a conversation", plan.turns),
        ("tokens in a conversation", plan.conversation_tokens),
        ("tokens in a sample", plan.sample_tokens),
    ):
        figures = distribution(values)
        cells = (f"{figures[column]:,}" for column in rows[0][1:-1])
        rows.append((name, *cells, f"{figures['mean']:,.1f}"))
    return table(rows)


def _mistrained(plan: Plan) -> str:
    counts = plan.mistrained
    rows: list[Sequence[str]] = [("what other pipelines would train wrongly", "tokens", "share")]
    for name, count in (
        ("one render: never trained", counts.one_render_never_trained),
        ("one render: after the wrong context", counts.one_render_wrong_context),
        ("thinking left in the history", counts.thinking_in_history),
        ("paper's code: no loss without thinking", counts.no_thinking_no_loss),
        ("paper's code: first response token", counts.first_response_token),
    ):
        rows.append((name, f"{count:,}", f"{count / plan.trained_tokens:.1%}"))
    text = table(rows)
    if counts.conversations_with_tool_messages:
        text += (
            "\nthe paper's code cannot take the "
            f"{pluralize(counts.conversations_with_tool_messages, 'conversation')} with tool "
            "messages at all"
        )
    return text


def _over_budget(plan: RowBudget) -> str:
    figures, split = plan.to_json(), plan.split
    heading = f"with rows of at most {plan.max_tokens:,} tokens"
    rows = f"  no packing has fewer than {pluralize(figures['fewest_rows'], 'row')}"
    if not split.trees:
        return f"{heading}: every conversation fits\n{rows}"
    lines = [
        heading,
        f"  larger: {pluralize(split.trees, 'conversation')}, cut into "
        f"{pluralize(split.pieces, 'piece')}, with "
        f"{split.repeated_tokens:,} tokens of history computed again",
    ]
    if split.dropped_samples:
        lines += [
            f"  too long by themselves: {pluralize(split.dropped_samples, 'sample')} with "
            f"{plan.dropped_trained_tokens:,} trained tokens; --on_overflow split refuses "
            "them, drop leaves them out, truncate keeps "
            f"{plan.truncated_trained_tokens:,} of these tokens",
            f"  left without any sample: {pluralize(split.lost_trees, 'conversation')}",
        ]
    if plan.tokens:
        lines += [
            f"  what is left: {plan.npass_tokens:,} tokens in N-pass, {plan.tokens:,} in "
            f"a single pass, ratio {plan.npass_tokens / plan.tokens:.2f}",
            rows,
        ]
    return "\n".join(lines)


def _bad_lines(plan: Plan) -> str:
    lines = [f"{pluralize(plan.num_bad_lines, 'bad line')} skipped"]
    lines.extend(f"  {bad.reason}" for bad in plan.bad_lines)
    if plan.num_bad_lines > len(plan.bad_lines):
        lines.append(f"  and {plan.num_bad_lines - len(plan.bad_lines):,} more")
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 2**10:.1f} KiB"
