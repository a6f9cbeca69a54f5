"""What a run with roles refuses to go on from."""

from types import SimpleNamespace

import pytest

from loomvideo.platform.errors import UserError
from loomvideo.platform.training.recipe import Role
from loomvideo.platform.training.roles import Roles


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            {"teacher": {"base": {"path": "weights/a", "digest": "1"}}},
            r"its teacher was weights/a \(1\), not",
        ),
        ({"critic": {}}, r"other roles beside the model \(critic\) than this run has \(teacher\)"),
        ({}, r"beside the model \(none\)"),
    ],
)
def test_another_teacher_and_other_roles_are_refused(stored, message):
    roles = object.__new__(Roles)
    roles.model = SimpleNamespace(load_slices=lambda *arguments: None)
    roles.updates, roles.engines = {}, {}
    roles._others = [Role("teacher", lambda: None, base=lambda: {"path": "weights/b", "digest": "2"})]
    roles._bases = {"teacher": {"path": "weights/b", "digest": "2"}}
    state = {"optimizer_step": 3, "roles": stored}
    checkpoint = SimpleNamespace(url="runs/x/step-3", state=state, read_many=None)
    with pytest.raises(UserError, match=rf"runs/x/step-3: .*{message}.*use another run name"):
        roles.load(checkpoint, None)
