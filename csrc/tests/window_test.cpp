// Unit test of what a rank does with frames of other hosts about its windows, whatever they say: nothing is ever stored
// outside a window, nor in one that is closed.
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "communicator/window.h"
#include "tests/expect.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr size_t kNbytes = 1000, kGuard = 4096;
constexpr std::byte kUntouched{0xA5}, kPut{0x11};

// A window in the middle of memory that is not part of it.
struct Guarded {
  Guarded() { memory.open(bytes.data() + kGuard, kNbytes); }
  bool is_untouched(size_t from, size_t to) const {
    for (size_t i = from; i < to; ++i)
      if (bytes[i] != kUntouched) return false;
    return true;
  }
  bool guards_stand() const { return is_untouched(0, kGuard) && is_untouched(kGuard + kNbytes, bytes.size()); }
  std::vector<std::byte> bytes = std::vector<std::byte>(kGuard + kNbytes + kGuard, kUntouched);
  WindowMemory memory;
};

const std::vector<std::byte> kSent(2 * kNbytes, kPut);

void a_put_that_fits_is_stored() {
  Guarded window;
  expect(window.memory.store(0, kSent.data(), kNbytes).empty(), "the whole window to be taken");
  expect(window.memory.store(kNbytes, kSent.data(), 0).empty(), "nothing at its end to be taken");
  expect(window.bytes[kGuard] == kPut && window.bytes[kGuard + kNbytes - 1] == kPut && window.guards_stand(),
         "exactly the window to be written");
}

void a_put_that_does_not_fit_is_refused_as_a_whole() {
  struct Case {
    uint64_t offset;
    size_t nbytes;
  };
  for (const Case& each : {Case{0, kNbytes + 1}, Case{kNbytes, 1}, Case{1, kNbytes}, Case{kNbytes + 1, 0},
                           Case{UINT64_MAX, 1}, Case{UINT64_MAX - 7, 8}, Case{uint64_t{0} - kGuard, 16}}) {
    Guarded window;
    const std::string problem = window.memory.store(each.offset, kSent.data(), each.nbytes);
    expect(problem.find(std::to_string(each.nbytes) + " bytes at byte " + std::to_string(each.offset) + " of 1000") !=
               std::string::npos,
           "the refusal to give the numbers, not '" + problem + "'");
    expect(window.is_untouched(0, window.bytes.size()), "nothing to be written");
  }
}

void a_closed_window_takes_nothing() {
  Guarded window;
  window.memory.close();
  expect(window.memory.store(0, kSent.data(), kNbytes).empty(), "nothing to be said: the sender may not know yet");
  expect(window.is_untouched(0, window.bytes.size()), "nothing to be written");
}

void random_numbers_write_nothing_outside() {
  std::mt19937_64 random(20261124);
  Guarded window;
  size_t stored = 0;
  for (int i = 0; i < 200'000; ++i) {
    const uint64_t wild = random();
    const uint64_t offset = i % 3 == 0 ? wild : i % 3 == 1 ? wild % (2 * kNbytes) : uint64_t{0} - wild % kGuard;
    const size_t nbytes = random() % kSent.size();
    const bool fits = offset <= kNbytes && nbytes <= kNbytes - offset;
    expect(window.memory.store(offset, kSent.data(), nbytes).empty() == fits,
           "what fits to be taken, and nothing else");
    stored += fits ? 1 : 0;
  }
  expect(stored > 1'000, "some of it to fit");
  expect(window.guards_stand(), "nothing outside the window to be written");
}

}  // namespace

int main() {
  return run({
      {"a put that fits is stored", a_put_that_fits_is_stored},
      {"a put that does not fit is refused as a whole", a_put_that_does_not_fit_is_refused_as_a_whole},
      {"a closed window takes nothing", a_closed_window_takes_nothing},
      {"random numbers write nothing outside", random_numbers_write_nothing_outside},
  });
}
