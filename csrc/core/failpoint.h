// Named points at which a test can have this process killed, stopped, ended, delayed or made to throw.
//
// Armed once, before the first group. An unarmed point is one comparison with a plain global, and a branch that is
// never taken.
#pragma once

#include <cstdint>
#include <string>

namespace hxcomm {

enum class Failpoint : uint8_t {
  none,
  post,       // a call is about to be posted
  staged,     // its contribution lies in scratch, nobody has been told
  arrived,    // its arrival is published
  judged,     // everybody has arrived with the same call; no peer's memory has been touched
  transfer,   // after a transfer of a plan, staging included
  published,  // after a plan has published one of its rounds
  ended,      // an operation has ended, well or not; its caller has not been told
  abort,      // this rank's abort word is set, no peer's is
  leave,      // the group is being left; peers still see a member
};

// What is armed. Written before the first group is made, by arm_failpoint() only.
inline Failpoint armed_failpoint = Failpoint::none;

void failpoint_reached();

inline void failpoint(Failpoint point) {
  if (armed_failpoint == point) [[unlikely]]
    failpoint_reached();
}

// "name[@nth]=action": the nth time (1: the first) that the named point is reached, do
//   kill (SIGKILL), exit (status 3), stop (SIGSTOP), stop300 (for 300 ms), pause:MS, or throw Error{aborted}, which
//   only post, staged, arrived, judged, transfer and published may.
// Throws Error{usage} listing what there is.
void arm_failpoint(const std::string& text);

}  // namespace hxcomm
