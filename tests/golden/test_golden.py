"""Methods reproduce what the authors' code was recorded to do."""


def test_golden(golden_check):
    golden_check()
