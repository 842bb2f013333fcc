"""What runs beside the other tests, in processes of its own: gpu_cases.py, and the table of other people's weights and encoders.

The fake GPU must be made before the first backward pass, and its threads do not survive a fork, which other tests need. The rest
fills the second core. `python -m pytest tests/gpu_cases.py` or `tests/test_encoders.py` runs one of them alone.
"""
import pytest
from conftest import BESIDE


@pytest.mark.parametrize("name", BESIDE)
def test_what_ran_beside_has_passed(name, beside):
    output = beside[name].communicate()[0]
    assert beside[name].returncode == 0, output[-5000:]
    assert " passed" in output and "failed" not in output
