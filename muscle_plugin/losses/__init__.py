"""Loss functions."""

from muscle_plugin.losses.mutual_information import (
    MutualInformationLoss,
    MutualInformationTerms,
    joint_distribution,
    mutual_information,
    mutual_information_terms,
)

__all__ = [
    "MutualInformationLoss",
    "MutualInformationTerms",
    "joint_distribution",
    "mutual_information",
    "mutual_information_terms",
]
