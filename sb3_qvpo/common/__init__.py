"""Building blocks that name no algorithm: schedules, the diffusion process, networks, candidates and policies."""
