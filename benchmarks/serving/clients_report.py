"""The results of `serving_clients.py` as Markdown."""

from typing import Any

from moe.export.verify import TOLERANCE


def markdown(results: dict[str, Any]) -> str:
    """The page `docs/results/serving_clients.md`."""
    architectures = results["architectures"]
    modified = " and uncommitted changes" if results["modified"] else ""
    first = next(iter(architectures.values()))
    clients = [(format, client) for format, found in first["formats"].items() for client in found]
    reasons: list[str] = []

    def cell(found: dict[str, Any]) -> str:
        if "refused" in found:
            if found["refused"] not in reasons:
                reasons.append(found["refused"])
            return f"not run ({reasons.index(found['refused']) + 1})"
        largest = max(found["text"], found["vocabulary"])
        figure = f"{largest:.1e}" if largest <= TOLERANCE else f"**{largest:.1e}**"
        return f"{figure}, {found['same_tokens']} of {found['tokens']}"

    rows = [
        [name, f"{own['loss']:.3f}", *(cell(own["formats"][format][client]) for format, client in clients)]
        for name, own in architectures.items()
    ]
    head = ["architecture", "loss", *(f"{client} ({format})" for format, client in clients)]
    hardware = results["hardware"]
    return "\n".join(
        [
            "# Trained models in every client",
            "",
            "Made by `uv run --extra onnx --extra gguf python -m benchmarks.serving_clients`, whose",
            "docstring says how. All figures: `benchmarks/results/serving_clients.json`.",
            "",
            f"- {results['date']}, commit {results['commit']}{modified}; python {results['python']}, "
            + ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
            f"- {hardware['processor']} ({', '.join(hardware['instructions'])})",
            f"- The quickstart as each architecture, {results['steps']} training steps, its own text and",
            "  tokenizer; exported and computed in float32",
            f"- {first['texts']} validation texts of {results['prompt']} tokens, each continued by "
            f"{results['new']} greedy ones",
            "",
            "A cell: the largest difference from our log-probabilities, over the tokens of the texts (nats)",
            "and over the whole vocabulary at every place of them (relative where one is below -1); and how",
            "many greedy tokens are ours, up to the first other one of each text. Bold: above "
            f"{TOLERANCE:.0e}. The",
            "loss is ours on these texts.",
            "",
            f"| {' | '.join(head)} |",
            "|" + "---|" * len(head),
            *(f"| {' | '.join(row)} |" for row in rows),
            *(["", "Not run:", ""] if reasons else []),
            *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
            "",
        ]
    )
