// How a local process ended, in words, from what the kernel tells a process that is not its parent.
#pragma once

#include <sys/types.h>

#include <string>

namespace hxcomm {

// "was killed by SIGKILL", "exited with status 1", or "died (the kernel does not tell the cause)".
// `pidfd` must be readable (the process is dead). Takes at most about 20 ms: the kernel knows the cause for sure only
// once the parent has reaped the process; until then /proc tells it.
std::string describe_death(int pidfd, pid_t pid);

}  // namespace hxcomm
