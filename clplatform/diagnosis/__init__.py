"""Why a run has forgotten: head bias, drift of representations, knowledge that is hidden or lost, the stability gap."""
