"""`steersman generate`."""

import json
from dataclasses import asdict
from typing import Any

from steersman.cli import console
from steersman.client.policy import GenerateOptions, PolicyClient
from steersman.client.types import Prompt, Sample


def parse_ids(text: str) -> list[int]:
    """Token ids from text such as "1 2 3" or "[1, 2, 3]"."""
    try:
        return [int(part) for part in text.strip("[] \n").replace(",", " ").split()]
    except ValueError:
        raise console.InputError(f"token ids are {text!r}, allowed: whole numbers, for example '1 2 3'") from None


def sample_row(sample: Sample) -> dict[str, Any]:
    """A sample as a JSON row."""
    spans = [{"version": str(span.version), "start": span.start, "end": span.end} for span in sample.weight_versions]
    return {
        "index": sample.index,
        "text": sample.text,
        "token_ids": sample.token_ids.tolist(),
        "logprobs": sample.logprobs.tolist(),
        "finish_reason": str(sample.finish_reason),
        "weight_versions": spans,
        "model": asdict(sample.model) if sample.model else None,
    }


def run(client: PolicyClient, prompt: Prompt, options: GenerateOptions, timeout: float | None, as_json: bool) -> None:
    """Prints the responses: one streams as it is made, several come whole as each ends, or as JSON lines."""
    if as_json:
        for sample in client.samples(prompt, timeout=timeout, **options):
            console.write(json.dumps(sample_row(sample), ensure_ascii=False) + "\n")
    elif options.get("num_samples", 1) == 1:
        with_text = options.get("return_text", False)
        for delta in client.stream(prompt, timeout=timeout, **options):
            console.write(delta.text if with_text else "".join(f"{token} " for token in delta.token_ids))
        console.write("\n")
    else:
        output = console.out()
        for sample in client.samples(prompt, timeout=timeout, **options):
            note = f"sample {sample.index}: {len(sample.token_ids)} tokens, ended by {sample.finish_reason}"
            output.rule(note, align="left", style="dim")
            console.write((sample.text or " ".join(map(str, sample.token_ids))) + "\n")
