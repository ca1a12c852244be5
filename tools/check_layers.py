"""Hold the layers: a module imports only from lower layers and from its own folder.

The order is the data's way through the package (README, "Where things are"). Run by `make lint`; exits 1 and names
each import that points upwards.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "streamgmm"

LAYERS = [
    ["errors", "_version", "exact", "units", "parallel", "storage"],
    ["transforms"],
    ["arriving", "device", "mixture", "statistics", "frame"],
    ["cost", "io"],
    ["kernels", "passes"],
    ["estep", "mstep", "weighting"],
    ["exchangeability", "precision", "sampling", "seeding"],
    ["steps"],
    ["distributed", "state"],
    ["feed", "processes", "sharing"],
    ["task"],
    ["nonfinite", "summing", "updating"],
    ["training"],
    ["checkpoint", "consistency", "memory", "request", "evaluation", "kmeans_parallel"],
    ["algorithm"],
    ["inference", "verification", "run"],
    ["recorder", "result"],
    ["job"],
    ["starting", "usage"],
    ["fitting", "report"],
    ["cluster"],
    ["prepare"],
    ["ann", "estimator", "progress", "demo"],
    ["cli"],
    ["__main__", "__init__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# storage raises errors; mixture is stored; statistics are framed: order within a layer where it matters.
WITHIN = {
    *(("storage", "errors"), ("units", "errors")),
    *(("frame", "mixture"), ("frame", "statistics")),
    ("checkpoint", "consistency"),
}


def unit(module: str) -> str:
    """The layer's member a module belongs to: ``streamgmm.io.plan`` is ``io``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and name of each module of this package that ``path`` imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "streamgmm":
            # `from streamgmm import inference` names a module, `from streamgmm.io import plan` is in io either way.
            names = [f"streamgmm.{alias.name}" for alias in node.names] if node.module == "streamgmm" else [node.module]
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.startswith("streamgmm")]
    return found


def main() -> int:
    violations = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        own = unit(".".join(relative.parts))
        if own not in LEVEL:
            violations.append(f"{path}: {own} has no layer; add it to tools/check_layers.py")
            continue
        for line, module in imports(path):
            other = unit(module)
            lower = other in LEVEL and LEVEL[other] < LEVEL[own]
            if other != own and not lower and (own, other) not in WITHIN:
                violations.append(f"{path}:{line}: {own} imports {module}, which is not below it")
    print("\n".join(violations) or f"layers hold: {len(LEVEL)} units, {len(LAYERS)} layers")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
