from __future__ import annotations

from embedtrain.recipes.building import workload_of
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.workload import Sizes


def test_a_tables_own_optimizer_decides_what_its_rows_take() -> None:
    overrides = ["data.path=x", "table.dim=50", "optimizer.tables.output.name=adam"]
    tables = workload_of(load_config(None, overrides), Sizes(default_num_rows=1000)).tables
    state_bytes = {table.name: (table.state_row_bytes, table.state_value_bytes) for table in tables}
    assert state_bytes == {"input": (4, 0), "output": (0, 8)}
