"""Parts of the ablation: its data, its methods, its tables and pictures."""
