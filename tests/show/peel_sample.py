"""Records of a peel as it would write them: a whole one, one stopped early, one with hostile strings."""

from __future__ import annotations

from peelwise.records.peel import MapRecord, PartLosses, PeelLossRecord, PeelRecord, StationRecord
from peelwise.references.map_search import map_name
from show.sample import HOSTILE, interval, whole


def _map(stations: tuple[int, ...], loss: float, *, head: bool = True) -> MapRecord:
    return MapRecord(
        stations=stations,
        name=map_name(stations),
        own_head=PartLosses(fit=loss, select=loss + 0.01, report=loss + 0.02),
        loss=PartLosses(fit=loss - 0.1, select=loss, report=loss) if head else None,
        gain_over_model=interval(2.87 - loss, 0.02),
        gain_over_head=interval(2.85 - loss, 0.02) if head else None,
        unexplained=tuple(0.05 * place for place in range(len(stations))),
        blocks_fitted=3,
        wall_seconds=4.2,
        forward_equivalents=7.5,
    )


def peel_record(blocks: int = 6, **changes: object) -> PeelRecord:
    """Return a peel in which leaving out stations 3 and 4 beats the model and its head control."""
    base = whole(blocks)
    best = (1, 2, 5, 5, 5, 6) if blocks == 6 else (*range(1, blocks - 2), blocks, blocks, blocks)
    maps = (_map(best, 2.7), _map(tuple(range(1, blocks + 1)), 2.85), _map((blocks,) * blocks, 3.4, head=False))
    verdicts = ("needed", "redundant", "misleading", "undecided", "not measured")
    stations = tuple(
        StationRecord(
            index=index,
            station=index + 1,
            name=f"model.layers.{index}",
            lost_nats=interval(0.03 * (index - 2), 0.01) if index % 5 < 4 else None,
            with_map=maps[1].stations,
            without_map=maps[0].stations,
            verdict=verdicts[index % 5],
        )
        for index in range(blocks - 1)
    )
    record = PeelRecord(
        **{
            name: getattr(base, name)
            for name in ("created", "complete", "margin_nats", "probe", "cost", "notes", "settings", "seed", "versions")
        },
        schema_version=base.schema_version,
        informative=True,
        start="warm",
        model=base.model.model_copy(update={"blocks": blocks}),
        witness=base.witness,
        loss=PeelLossRecord(
            current=2.87,
            head_control=2.85,
            bound=2.7,
            shuffled=2.88,
            untrained=5.9,
            head_control_gain=interval(0.02, 0.01),
            bound_gain=interval(0.17, 0.02),
            over_head_control=interval(0.15, 0.02),
            over_shuffled=interval(0.18, 0.02),
            over_untrained=interval(3.2, 0.1),
        ),
        best_map=best,
        maps=maps,
        maps_total=32,
        blocks=stations,
    )
    return record.model_copy(update=changes)


def unmeasured_record() -> PeelRecord:
    """Return a peel that was stopped before its first map."""
    record = peel_record()
    blocks = tuple(StationRecord(index=b.index, station=b.station, name=b.name) for b in record.blocks)
    return record.model_copy(
        update={
            "complete": False,
            "informative": None,
            "maps": (),
            "best_map": None,
            "blocks": blocks,
            "loss": PeelLossRecord(current=2.87),
        }
    )


def hostile_record() -> PeelRecord:
    """Return a peel whose strings try to be markup."""
    record = peel_record()
    return record.model_copy(
        update={
            "conclusion": HOSTILE,
            "notes": (HOSTILE,),
            "model": record.model.model_copy(update={"name": HOSTILE, "architecture": HOSTILE}),
            "maps": tuple(m.model_copy(update={"name": HOSTILE}) for m in record.maps),
        }
    )
