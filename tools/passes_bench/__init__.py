"""EM in few passes over the data: data sets, algorithms and schedules compared by held-out likelihood."""
