"""Write the demo's test questions in the 'messages' form into the current folder: all 200, and 12 of two kinds."""

import json
from pathlib import Path

from fsdp_qlora.data.demo import demo_rows

rows = demo_rows("test", 200, 42)
for name, words, limit in (("demo_test", "", 200), ("sums", "arithmetic problem", 12), ("gcd", "GCD", 12)):
    chosen = [row for row in rows if words in row["messages"][0]["content"]][:limit]
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
