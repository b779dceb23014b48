#include "core/failpoint.h"

#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <charconv>
#include <csignal>
#include <cstdint>
#include <ctime>

#include "core/errors.h"

namespace hxcomm {
namespace {

constexpr std::array<const char*, 10> kPoints = {"none",     "post",      "staged", "arrived", "judged",
                                                 "transfer", "published", "ended",  "abort",   "leave"};
static_assert(kPoints.size() == static_cast<size_t>(Failpoint::leave) + 1);

enum class Action : uint8_t { kill, exit, stop, stop300, pause, fail };
constexpr std::array<const char*, 6> kActions = {"kill", "exit", "stop", "stop300", "pause", "throw"};
constexpr int kExitStatus = 3;

Action action;
int64_t pause_ms;
std::atomic<int64_t> before_it{0};  // times that the point may still be passed

void sleep_ms(int64_t ms) {
  timespec rest{ms / 1000, ms % 1000 * 1'000'000};
  while (nanosleep(&rest, &rest) != 0) {
  }
}

// A child stops this process and lets it go on: nothing inside a stopped process can. Not fork(), whose handlers would
// count it as a fork of the program.
void stop_for_ms(int64_t ms) {
  const pid_t self = getpid();
  const auto child = static_cast<pid_t>(syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr));
  if (child == 0) {
    ::kill(self, SIGSTOP);
    sleep_ms(ms);
    ::kill(self, SIGCONT);
    _exit(0);
  }
  while (child > 0 && waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
}

template <size_t N>
std::string listed(const std::array<const char*, N>& names, size_t first) {
  std::string text;
  for (size_t i = first; i < N; ++i) text += (i > first ? ", " : "") + std::string(names[i]);
  return text;
}

template <size_t N>
size_t index_of(const std::array<const char*, N>& names, const std::string& name) {
  size_t i = 0;
  while (i < N && name != names[i]) ++i;
  return i;
}

bool read_number(const std::string& text, int64_t* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc{} && end == text.data() + text.size() && *value > 0;
}

}  // namespace

void failpoint_reached() {
  if (before_it.fetch_sub(1) != 0) return;
  switch (action) {
    case Action::kill:
      ::kill(getpid(), SIGKILL);
      break;
    case Action::exit:
      _exit(kExitStatus);
    case Action::stop:
      ::kill(getpid(), SIGSTOP);
      break;
    case Action::stop300:
      stop_for_ms(300);
      break;
    case Action::pause:
      sleep_ms(pause_ms);
      break;
    case Action::fail:
      throw Error(ErrorKind::aborted, std::string("the failpoint '") + kPoints[static_cast<size_t>(armed_failpoint)] +
                                          "' was armed to throw (HXCOMM_FAILPOINT)");
  }
}

void arm_failpoint(const std::string& text) {
  const auto wrong = [&](const std::string& what) {
    return Error(ErrorKind::usage, "HXCOMM_FAILPOINT='" + text + "': " + what +
                                       "; write point[@nth]=action with a point of " + listed(kPoints, 1) +
                                       " and an action of " + listed(kActions, 0) + " (pause as pause:MS)");
  };
  const size_t equals = text.find('=');
  if (equals == std::string::npos) throw wrong("there is no '='");
  std::string name = text.substr(0, equals), what = text.substr(equals + 1);
  int64_t nth = 1;
  if (const size_t at = name.find('@'); at != std::string::npos) {
    if (!read_number(name.substr(at + 1), &nth)) throw wrong("after '@' stands no number from 1 on");
    name.resize(at);
  }
  int64_t ms = 0;
  if (what.rfind("pause:", 0) == 0) {
    if (!read_number(what.substr(6), &ms)) throw wrong("after 'pause:' stands no number of milliseconds from 1 on");
    what.resize(5);
  } else if (what == "pause") {
    throw wrong("pause has no number of milliseconds");
  }
  const size_t point = index_of(kPoints, name), chosen = index_of(kActions, what);
  if (point == 0 || point == kPoints.size()) throw wrong("there is no point '" + name + "'");
  if (chosen == kActions.size()) throw wrong("there is no action '" + what + "'");
  // The later points lie where nobody could catch it: in destructors, and on the watcher's thread.
  if (static_cast<Action>(chosen) == Action::fail && point > static_cast<size_t>(Failpoint::published))
    throw wrong("nothing can be thrown at '" + name + "'");
  action = static_cast<Action>(chosen);
  pause_ms = ms;
  before_it.store(nth - 1);
  armed_failpoint = static_cast<Failpoint>(point);
}

}  // namespace hxcomm
