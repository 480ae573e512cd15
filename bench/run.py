"""`make bench`: measures Pointbook against an echo on the same machine, prints a table and writes results.json.

Every row is measured in several rounds that take turns, and the median counts: what else this machine does then
burdens all rows alike. Speed is told as a ratio, and no ratio fails the run.
"""

import argparse
import asyncio
import secrets
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import asyncpg
import uvloop
from rich.progress import Progress

from calls import PROGRAM_ID, SECRET
from development import measure_development
from jobs import Job, Kind, Measurement
from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_server.access.model import ALL_MERCHANTS, Scope, new_token
from pointbook_server.access.store import AccessStore
from pointbook_server.clock import system_clock
from pointbook_server.database import Database
from pointbook_server.migrations import migrate
from pointbook_server.programs.model import Program
from pointbook_server.programs.store import ProgramsStore
from processes import Load, Served, loading, serving
from report import Result, print_table, write_json
from shops import Population
from statements import count_statements

ROUNDS = 3
IN_FLIGHT = 64
IDLE_SECONDS = 1.0
ISSUED_PER_SECOND_MAX = 5_000
ROOT = Path(__file__).parent.parent
