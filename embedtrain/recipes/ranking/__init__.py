"""Ranking: DLRM and DCN-V2 on click logs."""
