"""The facts of a schema, which checkpoints hold a hash of."""

from __future__ import annotations

from dataclasses import fields

from embedtrain.data.click_schema import CategoricalColumn, ClickSchema


def schema(**options: object) -> ClickSchema:
    return ClickSchema(
        file_format="csv",
        label="y",
        dense=("a",),
        categorical=(CategoricalColumn(name="u"),),
        columns=("y", "a", "u"),
        **options,  # type: ignore[arg-type]
    )


def test_the_facts_are_those_of_checkpoints_from_before_there_were_quotes() -> None:
    assert schema().facts == (
        "ClickSchema(file_format='csv', label='y', dense=('a',), categorical=(CategoricalColumn(name='u', "
        "num_rows=None, encoding='vocabulary', min_count=1, is_bag=False, separator='|'),), positive=None, "
        "columns=('y', 'a', 'u'), delimiter=',', dense_transform='log1p')"
    )
    columns = [CategoricalColumn(name="C1", num_rows=7), CategoricalColumn(name="C2", is_bag=True)]
    facts = ClickSchema.criteo(columns).facts
    assert facts.startswith("ClickSchema(file_format='criteo', label='label', dense=('I1', ")
    assert "is_bag=False, separator='|'), CategoricalColumn(name='C2'" in facts
    assert facts.endswith("delimiter='\\t', dense_transform='log1p')")


def test_each_field_is_a_fact() -> None:
    assert len({schema().facts, schema(quote=None).facts, schema(quote="'").facts, schema(delimiter=";").facts}) == 4
    for field in fields(ClickSchema):
        assert f"{field.name}=" in schema(quote="'").facts
    for field in fields(CategoricalColumn):
        assert f"{field.name}=" in schema().facts
