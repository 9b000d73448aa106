"""Prints base/prometheusrule.yaml from deploy/prometheus: `make manifests` writes it, a test compares the two."""

from pathlib import Path

import yaml

RULES = Path(__file__).resolve().parent.parent / "prometheus"

HEAD = """# Written by `make manifests` from the files in deploy/prometheus; edit the rules there.
# Your Prometheus resource may want a label here to select it by.
"""


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines as blocks; nothing by reference."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text.strip() else None
    ),
)


def main() -> None:
    """The Prometheus Operator's resource with every group of every rule file."""
    groups = [group for file in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(file.read_text())["groups"]]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "stream-monitor"},
        "spec": {"groups": groups},
    }
    print(HEAD + yaml.dump(rule, Dumper=_Dumper, sort_keys=False, width=120), end="")


if __name__ == "__main__":
    main()
