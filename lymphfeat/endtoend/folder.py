"""What an end-to-end training leaves in its folder: one model, or k-fold members."""

from lymphfeat.endtoend.curves import CURVES
from lymphfeat.endtoend.submission import IMAGES_FILE, PATIENTS_FILE, SUBMISSION_FILE
from lymphfeat.files import ResultKind
from lymphfeat.model import FACTS_FILE, MEMBERS_FILE, WEIGHTS_FILE

_ONE = (FACTS_FILE, WEIGHTS_FILE, *CURVES)
MODEL = ResultKind(
    name="model",
    marks=(FACTS_FILE, MEMBERS_FILE),
    files=(
        *(*_ONE, PATIENTS_FILE, IMAGES_FILE, SUBMISSION_FILE),
        *(MEMBERS_FILE, *(f"fold-*/{name}" for name in _ONE)),
    ),
)
