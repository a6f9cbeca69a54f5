"""The version of the code that makes pixels changes with what the code does, and with nothing else."""

from loomvideo.model.code_version import kernels_version, meaning, sampler_version


def test_only_what_code_does_counts():
    code = 'def f(x):\n    """Doubles."""\n    return x * 2\n'
    assert meaning(code) == meaning("# a comment\ndef f(x):\n\n    return x*2  # twice\n")
    assert meaning(code) != meaning(code.replace("* 2", "* 3"))


def test_sampler_and_kernels_have_versions_of_their_own():
    assert len(sampler_version()) == len(kernels_version()) == 12
    assert sampler_version() != kernels_version()
