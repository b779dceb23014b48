#include "transport/death.h"

#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace hxcomm {
namespace {

// Linux 6.15, include/uapi/linux/pidfd.h; declared here because Debian 12's headers are older than its kernels here.
struct PidfdInfo {
  uint64_t mask;
  uint64_t cgroupid;
  uint32_t pid, tgid, ppid, ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
  int32_t exit_code;
  uint32_t coredump_mask, coredump_signal;
};
static_assert(sizeof(PidfdInfo) == 72);
constexpr uint64_t kPidfdInfoExit = 1u << 3;
constexpr unsigned long kPidfdGetInfo = _IOWR(0xFF, 11, PidfdInfo);

bool exit_status_from_pidfd(int pidfd, int* status) {
  PidfdInfo info{};
  info.mask = kPidfdInfoExit;
  if (ioctl(pidfd, kPidfdGetInfo, &info) != 0 || (info.mask & kPidfdInfoExit) == 0) return false;
  *status = info.exit_code;
  return true;
}

// The last field of /proc/PID/stat is the wait status of a zombie. The pid cannot be recycled while it is one.
bool exit_status_from_proc(pid_t pid, int* status) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return false;
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos || name_end + 2 >= line.size() || line[name_end + 2] != 'Z') return false;
  const size_t last = line.find_last_of(' ');
  *status = std::atoi(line.c_str() + last + 1);
  return true;
}

}  // namespace

std::string describe_death(int pidfd, pid_t pid) {
  for (int attempt = 0; attempt < 20; ++attempt) {
    int status = 0;
    if (exit_status_from_pidfd(pidfd, &status) || exit_status_from_proc(pid, &status)) {
      if (WIFSIGNALED(status)) {
        const char* name = sigabbrev_np(WTERMSIG(status));
        return "was killed by SIG" + (name != nullptr ? std::string(name) : std::to_string(WTERMSIG(status)));
      }
      return "exited with status " + std::to_string(WEXITSTATUS(status));
    }
    const timespec ms{0, 1'000'000};
    nanosleep(&ms, nullptr);
  }
  return "died (the kernel does not tell the cause)";
}

}  // namespace hxcomm
