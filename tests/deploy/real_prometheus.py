"""A real Prometheus with our rules, in which time passes faster: a scale of 60 turns five minutes into five seconds.

Ranges, offsets and `for` in the rules are divided by the scale, and nothing else of a rule is changed. What is an hour
in a rule of ours is waited for, not made up from backfilled blocks. The shortest range still sees five scrapes.
"""

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.promql import RULES

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SCRAPE, EVALUATION = "1s", "500ms"
Series = tuple[dict[str, str], list[tuple[float, float]]]
"""Labels, and times with values."""


def scaled_duration(text: str, scale: int) -> str:
    """`1h` at a scale of 60 is 60000ms."""
    return f"{int(text[:-1]) * UNITS[text[-1]] * 1000 // scale}ms"


def scaled_expression(expression: str, scale: int) -> str:
    """With ranges and offsets divided."""
    return re.sub(r"(\[|offset )(\d+[smhd])\b", lambda found: found[1] + scaled_duration(found[2], scale), expression)


def scaled_rules(path: Path, scale: int) -> str:
    """A file of rules as a faster Prometheus reads it."""
    content = yaml.safe_load(path.read_text())
    for rule in (rule for group in content["groups"] for rule in group["rules"]):
        rule["expr"] = scaled_expression(rule["expr"], scale)
        if "for" in rule:
            rule["for"] = scaled_duration(rule["for"], scale)
    return yaml.safe_dump(content)


class Prometheus:
    """A server process in `folder`, scraping `targets` (job to address). Use as a context."""

    def __init__(self, folder: Path, port: int, targets: dict[str, str], scale: int) -> None:
        self.scale = scale
        self._targets = len(targets)
        self.started = time.time()
        for path in RULES:
            (folder / path.name).write_text(scaled_rules(path, scale))
        config = {
            "global": {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "evaluation_interval": EVALUATION},
            "rule_files": [path.name for path in RULES],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in targets.items()
            ],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._log = (folder / "prometheus.log").open("w")
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
                "--query.lookback-delta=5s",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> "Prometheus":
        deadline = time.monotonic() + 60
        while not self._settled():
            assert self._process.poll() is None, Path(self._log.name).read_text()
            assert time.monotonic() < deadline, "Prometheus is not ready"
            time.sleep(0.05)
        self.started = time.time()
        return self

    def _settled(self) -> bool:
        """It scrapes, which begins five seconds after its start, and what it missed until then alerts no more."""
        try:
            if self._client.get("/-/ready").status_code != 200:
                return False
        except httpx.TransportError:
            return False
        up = self.get("query", query="up == 1")["result"]
        alerts = self.get("query", query="ALERTS")["result"]
        return len(up) == self._targets and all(
            alert["metric"]["alertname"] != "StreamMonitorAbsent" for alert in alerts
        )

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._client.close()
        self._log.close()

    def get(self, path: str, **arguments: object) -> Any:
        """`data` of an answer of the API."""
        answer = self._client.get(f"/api/v1/{path}", params=arguments).json()  # type: ignore[arg-type]
        assert answer["status"] == "success", (arguments, answer)
        return answer["data"]

    def over_the_run(self, expression: str, step: float = 0.5) -> list[Series]:
        """All series of an expression, from the start until now. Not scaled."""
        data = self.get("query_range", query=expression, start=self.started, end=time.time(), step=step)
        assert data["resultType"] == "matrix"
        return [
            (result["metric"], [(float(at), float(value)) for at, value in result["values"]])
            for result in data["result"]
        ]

    def exemplars(self, selector: str) -> list[dict[str, str]]:
        """Labels of all exemplars of a series."""
        found = self.get("query_exemplars", query=selector, start=self.started, end=time.time())
        return [each["labels"] for series in found for each in series["exemplars"]]

    def unhealthy_rules(self) -> list[str]:
        """Rules whose last evaluation failed, with the error."""
        groups = self.get("rules")["groups"]
        return [
            f"{rule['name']}: {rule.get('lastError', rule['health'])}"
            for group in groups
            for rule in group["rules"]
            if rule["health"] not in ("ok", "unknown")
        ]
