"""What a machine does in a second, as `embedtrain plan --measure` finds it, in a small JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from embedtrain.errors import UserError

FORMAT = "embedtrain-machine"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one rank while all ranks of the measurement work.

    Attributes:
        name: of the processor.
        num_ranks: that measured.
        gather_bytes_per_second: of rows, copied from random places of a large table.
        update_bytes_per_second: of rows, read and written at random places by the optimizer's kernel.
        sum_bytes_per_second: of gradients that are added up by row.
        sort_ids_per_second: ids of a batch made distinct.
        exchange_bytes_per_second: that a rank sends to the others of its host, in messages of a MiB or more.
        collective_seconds: of a collective of a few bytes between two ranks.
        step_seconds: what a step costs beside all that, for one feature.
        feature_seconds: and for each further one.
        sample_draws_per_second: words and negatives drawn from a text.
        positives_per_second: interactions made into examples of retrieval, with what their users are known to have.
        records_per_second: examples of a click log that are read.
        record_values_per_second: and for each number or row of them besides.
        skipgram_scores_per_second: of a centre's context and a word, in the word2vec kernel, forward and backward.
        skipgram_products_per_second: and multiply-adds of these besides.
        dense_products_per_second: multiply-adds of a matrix product.
        batched_products_per_second: multiply-adds of many small products at once.
        op_seconds: of an operation of torch on next to nothing, forward, backward or of an optimizer.
        values_per_second: numbers that the operations of layers return.
        score_values_per_second: numbers that those of a softmax over scores return.
        seconds_per_predicted_second: that rows take in a step for each second of what is done to them by itself: in
            a step caches are colder, and ranks wait for one another.
        network_bytes_per_second: that a host sends to the others, all its ranks together; None where not known.
    """

    name: str
    num_ranks: int
    gather_bytes_per_second: float
    update_bytes_per_second: float
    sum_bytes_per_second: float
    sort_ids_per_second: float
    exchange_bytes_per_second: float
    collective_seconds: float
    step_seconds: float
    feature_seconds: float
    sample_draws_per_second: float
    positives_per_second: float
    records_per_second: float
    record_values_per_second: float
    skipgram_scores_per_second: float
    skipgram_products_per_second: float
    dense_products_per_second: float
    batched_products_per_second: float
    op_seconds: float
    values_per_second: float
    score_values_per_second: float
    seconds_per_predicted_second: float
    network_bytes_per_second: float | None = None

    def to_json(self) -> str:
        """Returns the text of the file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Machine:
        """Reads the text of a file.

        Raises:
            UserError: it is another file, or a rate is missing or not a positive number.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"{source} is not a machine's profile: {error}") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise UserError(f"{source} is not a machine's profile: make one by `embedtrain plan --measure FILE`")
        missing = [name for name in cls.rates() if name not in values and name != "network_bytes_per_second"]
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if missing or unknown:
            raise UserError(
                f"{source}: expected the rates {', '.join(cls.rates())}; "
                f"missing {', '.join(missing) or 'none'}, unknown {', '.join(unknown) or 'none'}"
            )
        given = {name: values[name] for name in cls.rates() if values.get(name) is not None}
        ones = dict.fromkeys((name for name in cls.rates() if name != "network_bytes_per_second"), 1.0)
        blank = cls(name=str(values.get("name", "")), num_ranks=int(values.get("num_ranks") or 1), **ones)
        return blank.with_rates(given, source)

    def with_rates(self, rates: Mapping[str, Any], source: str) -> Machine:
        """Returns the machine with some rates replaced.

        Raises:
            UserError: there is no such rate, or it is not a positive number.
        """
        for name, value in rates.items():
            if name not in self.rates():
                raise UserError(f"{source}: there is no rate {name!r}; there are {', '.join(self.rates())}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"{source}: {name} must be a positive number, got {value!r}")
        changes: dict[str, Any] = {name: float(value) for name, value in rates.items()}
        return replace(self, **changes)

    @classmethod
    def rates(cls) -> list[str]:
        """Returns the names of the rates."""
        return [field.name for field in fields(cls) if "seconds" in field.name or "per_second" in field.name]
