"""Look at every row of some files under the X-ray, with a model's own template or another: what is wrong, how fast.

python -m benchmarks.rendering FILE ... --model FOLDER [--chat-template FILE --name NAME]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import record
from lit_reason.data.datamodule import TraceData
from lit_reason.data.inspection.xray_scan import Scan
from lit_reason.data.token_row import SEGMENT_NAMES
from lit_reason.models.config import ModelConfig
from lit_reason.models.loading import load_tokenizer


def examine_file(path: str, tokenizer: Any) -> dict[str, Any]:
    """Counts of one file, with the first findings in words.

    Args:
        path: file of rows in any known format.
        tokenizer: with its chat template.
    """
    data = TraceData(train_file=path, max_length=2048)
    data.tokenizer = tokenizer
    start, start_cpu = time.perf_counter(), time.process_time()
    scan = Scan(data, "train")
    for _ in tqdm(scan, desc=Path(path).name, unit=" rows"):
        pass
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    tally = scan.tally
    return {
        "records": tally.records,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "records_per_cpu_second": round((tally.records + scan.unusable.total) / cpu_seconds, 1),
        "rows_to_train_on": tally.rows,
        "longer_than_2048": tally.over,
        "tokens": {n: int(c) for n, c in zip(SEGMENT_NAMES, tally.tokens, strict=True) if c},
        "trained_share": round(tally.trained_share, 4),
        "length_median_max": [tally.length_at(0.5), tally.length_at(1.0)],
        "unusable": {"rows": scan.unusable.total, "reasons": dict(scan.unusable.counts)},
        "findings": dict(tally.findings),
        "first_findings": [str(f) for f in tally.in_order()[:3]],
        "notes": list(scan.notes),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--chat-template")
    parser.add_argument("--name", default="rendering")
    options = parser.parse_args()
    tokenizer = load_tokenizer(ModelConfig(path=options.model, chat_template=options.chat_template))
    result = {Path(f).name: examine_file(f, tokenizer) for f in options.files}
    for name, facts in result.items():
        print(name, {k: v for k, v in facts.items() if k not in ("notes", "first_findings")})
    names = " ".join(Path(f).name for f in options.files)
    model = Path(options.model).name
    command = f"python -m benchmarks.rendering {names} --model {model}"
    if options.chat_template:
        command += f" --chat-template {options.chat_template} --name {options.name}"
    busy = "other programs ran on the machine: compare records_per_cpu_second, not seconds"
    print(record(options.name, result, [busy], command))
