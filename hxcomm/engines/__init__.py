"""hxcomm inside engines that serve language models: one folder or file each, imported only by its engine's own plug-in
mechanism. An engine's file holds what that engine asks of a backend, and nothing of how collectives are done."""
