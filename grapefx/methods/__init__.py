"""Holds the training methods, one small file each, and finds them by name.

A method says how the output error e becomes the gradient at each feedback point and how its
feedback maps learn. Papers are cited as GrAPE 2026 (Caillon et al., ICLR 2026), GrAPE 2024 (its
earlier submission; "review" is the public discussion of that) and FDFA 2024 (Bacho and Chu 2024).
"""

from __future__ import annotations

from grapefx.methods.base import MECHANISMS, READS, Method, Rows, State
from grapefx.methods.bp import BP
from grapefx.methods.builtin import BUILTIN
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

__all__ = [
    "BP",
    "BRSF",
    "BUILTIN",
    "DFA",
    "DKP",
    "DRTP",
    "FA",
    "FDFA",
    "FGA",
    "FGW",
    "FRSF",
    "LGFGA",
    "MECHANISMS",
    "PEPITA",
    "READS",
    "USF",
    "GrAPE",
    "GrAPE2024",
    "Method",
    "Rows",
    "State",
    "find",
    "get_method",
    "names",
    "option_names",
    "preset_options",
]
