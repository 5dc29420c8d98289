"""One paper, one file. Importing this package fills the registry."""

from __future__ import annotations

from stepdistill.objectives.adversarial.diffusion_gan import DiffusionGAN
from stepdistill.objectives.adversarial.gdd import GDD
from stepdistill.objectives.adversarial.ladd import LADD
from stepdistill.objectives.consistency.cd import CD
from stepdistill.objectives.consistency.ct import CT
from stepdistill.objectives.consistency.ect import ECT
from stepdistill.objectives.consistency.icd import ICD
from stepdistill.objectives.consistency.ict import ICT
from stepdistill.objectives.consistency.lcm import LCM
from stepdistill.objectives.consistency.scm import SCM
from stepdistill.objectives.flowmap.mdt import MDT
from stepdistill.objectives.flowmap.mean_flow import MeanFlow
from stepdistill.objectives.flowmap.twinflow import TwinFlow
from stepdistill.objectives.score.decoupled_dmd import DecoupledDMD
from stepdistill.objectives.score.disback import DisBack
from stepdistill.objectives.score.dmd import DMD
from stepdistill.objectives.score.dmd2 import DMD2
from stepdistill.objectives.score.f_distill import FDistill
from stepdistill.objectives.score.sds import SDS
from stepdistill.objectives.score.sid import SiD
from stepdistill.objectives.score.snoopi import SNOOPI
from stepdistill.objectives.score.vsd import VSD
from stepdistill.objectives.trajectory.guided import GuidedDistillation
from stepdistill.objectives.trajectory.imagine_flash import ImagineFlash
from stepdistill.objectives.trajectory.kd import KD
from stepdistill.objectives.trajectory.pcm import PCM
from stepdistill.objectives.trajectory.pd import PD
from stepdistill.objectives.trajectory.reflow import Reflow
from stepdistill.objectives.trajectory.tscd import TSCD

__all__ = [
    "CD",
    "CT",
    "DMD",
    "DMD2",
    "ECT",
    "GDD",
    "ICD",
    "ICT",
    "KD",
    "LADD",
    "LCM",
    "MDT",
    "PCM",
    "PD",
    "SCM",
    "SDS",
    "SNOOPI",
    "TSCD",
    "VSD",
    "DecoupledDMD",
    "DiffusionGAN",
    "DisBack",
    "FDistill",
    "GuidedDistillation",
    "ImagineFlash",
    "MeanFlow",
    "Reflow",
    "SiD",
    "TwinFlow",
]
