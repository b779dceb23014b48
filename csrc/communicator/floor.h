// The floor under a group's collectives: what its plans' transfers and flags take when nothing else is done.
//
// Measured on the group's own segments, between its own ranks, with its own sequence numbers, so the group works as
// before afterwards. Every rank must call the same function with the same arguments, and nothing may be pending.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "communicator/group.h"

namespace hxcomm {

class Floor {
 public:
  // Throws Error{usage} where an operation of the group is pending. Holds the group's driver lock while it lives.
  explicit Floor(Group& group);

  // Seconds that one all_reduce (sum, in place) of `nbytes` takes: the plan that the group's planner chooses, with no
  // fingerprint, descriptor, deadline, doorbell or queue. `iterations` of them in blocks; the median of the blocks.
  // `touched`: each writes the whole buffer before and reads it after, and the time of that alone, measured between the
  // blocks, is subtracted. Blocks until every rank is done. Throws the error that ended the group.
  static double all_reduce_seconds(Group& group, uint64_t nbytes, DType dtype, int iterations, bool touched,
                                   DeviceKind device);

  // Seconds of a flag's way from rank 0 to rank 1 and back; 0 on the other ranks and where there is no rank 1.
  static double hand_over_seconds(Group& group, int iterations);

 private:
  struct Prepared {
    Choice choice;
    uint64_t window = 0;
    uint64_t count = 0;
    std::vector<Block> blocks;           // by rank: the buffer that is reduced, of peers where the plan is mapped
    std::vector<const Block*> block_of;  // into it
    size_t stride = 0;
    std::vector<std::byte*> scratch[2];  // of every rank, by parity of the sequence
  };
  void run_once(const Prepared& prepared, DType dtype);
  void publish(uint64_t value);
  void wait_for(int rank, uint64_t value);

  Group& group_;
  std::unique_lock<std::mutex> driver_;
};

// Seconds that memcpy takes for `nbytes`, on warm buffers: the median of blocks of iterations.
double copy_seconds(size_t nbytes, int iterations);

}  // namespace hxcomm
