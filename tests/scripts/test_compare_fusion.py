"""The table of the fusion models' comparison, from made-up rows with known answers."""
import compare_fusion
import pandas


def test_differences_are_of_equal_seeds_and_columns_of_what_a_family_has():
    rows = [
        {"family": family, "reduction": name, "seed": seed, "epochs": 2, "loss": 2 + seed + (name == "elip") / 4,
         column: (seed + (name == "elip")) / 100}
        for family, column in (("albef", "recall"), ("meter", "val-itm_accuracy"))
        for seed, name in ((1, "elip"), (0, "none"), (1, "none"), (0, "elip"))
    ]  # fmt: skip
    albef, meter = compare_fusion.tables(pandas.DataFrame(rows))
    assert albef.splitlines() == [
        "**ALBEF**, 2 seeds, 2 epochs", "",
        "|  | features alone, mean recall | loss, last epoch |", "| --- | --: | --: |",
        "| `none` | 0.50 ± 0.71 | 2.50 ± 0.71 |", "| `elip` | 1.50 ± 0.71 | 2.75 ± 0.71 |",
        "| difference | +1.00 ± 0.00 | +0.25 ± 0.00 |",
    ]  # fmt: skip
    assert "matching right" in meter and "recall" not in meter
