from types import SimpleNamespace

import pytest

from loomvideo.jobs.training.setup import check_fits
from loomvideo.model.sizes import model_size
from loomvideo.platform.errors import UserError


def dataset(model="tiny", codec="dct-1"):
    manifest = SimpleNamespace(config={"model": model}, encoders={"codec": codec})
    return SimpleNamespace(manifest=manifest)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dataset(model="small"), "encoded for model=small, this run is model=tiny"),
        (dataset(codec="dct-2"), "other encoders than the first dataset"),
    ],
)
def test_shards_that_do_not_fit_are_refused_by_name(wrong, message):
    check_fits("a", dataset(), dataset(), model_size("tiny"))
    with pytest.raises(UserError, match=f"data.shards b: .*{message}"):
        check_fits("b", wrong, dataset(), model_size("tiny"))
