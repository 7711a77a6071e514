"""Where recorded numbers come from, in a few printed lines for the end of a notebook."""

from __future__ import annotations

from lesslib.profiles import results_dir
from lesslib.reporting.results import load


def provenance(profile: str, *names: str) -> None:
    """Print the manifest of each named result: commit, date, seconds, hardware and data.

    Raises FileNotFoundError for a result that is not recorded.
    """
    for name in names:
        record = load(name, profile)
        if record is None:
            path = results_dir(profile) / f"{name}.json"
            raise FileNotFoundError(f"{path} is not there: run the cells above first")
        manifest = record["manifest"]
        hardware = manifest["hardware"]
        print(
            name,
            f"commit {manifest['commit'][:12]}",
            manifest["date"][:10],
            f"{manifest['seconds']:.0f} s",
            hardware["cpu"],
            hardware["gpu"] or "no GPU",
            sep=" | ",
        )
        for source in manifest["data"]:
            print("   ", source["name"], source.get("origin", ""), source["sha256"][:12])
