"""The methods that come with grapefx, by name, in the order in which they are listed."""

from __future__ import annotations

from grapefx.methods.base import Method
from grapefx.methods.bp import BP
from grapefx.methods.dfa import DFA
from grapefx.methods.dkp import DKP
from grapefx.methods.drtp import DRTP
from grapefx.methods.fa import FA
from grapefx.methods.fdfa import FDFA
from grapefx.methods.fg_a import FGA
from grapefx.methods.fg_w import FGW
from grapefx.methods.grape import GrAPE
from grapefx.methods.grape_2024 import GrAPE2024
from grapefx.methods.lg_fg_a import LGFGA
from grapefx.methods.pepita import PEPITA
from grapefx.methods.sign_symmetric import BRSF, FRSF, USF

_ALL: tuple[type[Method], ...] = (
    *(BP, FA, USF, BRSF, FRSF),
    *(DFA, DRTP, PEPITA, DKP, FDFA),
    *(FGW, FGA, LGFGA),
    *(GrAPE, GrAPE2024),
)
BUILTIN: dict[str, type[Method]] = {m.name: m for m in _ALL}
