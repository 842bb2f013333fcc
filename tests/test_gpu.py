"""The scripts on a GPU without data: gpu_cases.py, in a process of its own.

There the device must be made before the first backward pass, and its threads do not survive a fork, which other tests need.
`python -m pytest tests/gpu_cases.py` runs the cases alone.
"""


def test_the_scripts_on_a_gpu_without_data(gpu_cases):
    output = gpu_cases.communicate()[0]
    assert gpu_cases.returncode == 0, output[-5000:]
    assert " passed" in output and "failed" not in output
