"""Holds the training methods, one small file each, and finds them by name.

A method says how the output error e becomes the gradient at each feedback point and how its
feedback maps learn. Papers are cited as GrAPE 2026 (Caillon et al., ICLR 2026), GrAPE 2024 (its
earlier submission; "review" is the public discussion of that) and FDFA 2024 (Bacho and Chu 2024);
docs/method.md calls them 001, 002, 004 and 003.
"""

from __future__ import annotations

from grapefx.methods.base import MECHANISMS, READS, Method, Rows, State
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
from grapefx.methods.registry import find, get_method, names, option_names, preset_options
from grapefx.methods.sign_symmetric import BRSF, FRSF, USF

_ALL: tuple[type[Method], ...] = (
    *(BP, FA, USF, BRSF, FRSF),
    *(DFA, DRTP, PEPITA, DKP, FDFA),
    *(FGW, FGA, LGFGA),
    *(GrAPE, GrAPE2024),
)
BUILTIN: dict[str, type[Method]] = {m.name: m for m in _ALL}

__all__ = [
    "BUILTIN",
    "MECHANISMS",
    "READS",
    "Method",
    "Rows",
    "State",
    "find",
    "get_method",
    "names",
    "option_names",
    "preset_options",
]
