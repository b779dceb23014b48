// A plan written by hand, in the format of hxcomm/schedule/plan.py: an all_reduce of two ranks, staged.
//
// Each rank owns the chunk with its number. It stages the other's chunk in its own scratch (round 0), reduces its own
// chunk with what the other staged (round 1), and fetches the other's result (round 2). What a rank stages in the next
// operation was read before the peer published round 1, and scratch chunk 1 is written after the next ENTER only, so
// one scratch serves any number of operations.
#pragma once

#include <cstdint>
#include <vector>

namespace hxcomm::test {

inline constexpr int32_t kInput = 0, kOutput = 1, kScratch = 2;
inline constexpr int32_t kFresh = 0, kPartial = 1, kFinal = 2;
inline constexpr int32_t kPrivate = 2;

// Where its words lie, for tests that spoil them.
inline constexpr size_t kStageWord = 16, kEnterWord = 31, kReduceWord = 32, kPublishWord = 55, kWaitWord = 57,
                        kFetchWord = 60, kEndWord = 75;

// clang-format off: a line is what belongs together, not a word
inline std::vector<int32_t> staged_all_reduce(int32_t rank) {
  const int32_t mine = rank, other = 1 - rank;
  return {
      0x48585031, 2, 2, rank, 3,       // magic, version, world size, rank, rounds
      1, 2, 1, 2, 2,                   // input blocks and pieces, output blocks and pieces, scratch chunks
      kPrivate | 4, 76, 31, -1, 0, 0,  // flags (it reduces), words, index of ENTER, no root, op, zero
      1, 0, 0, kInput, other, 1, 1,    // 16 TRANSFER copy: stage the other's chunk of my input
      rank, kInput, other, kFresh,
      rank, kScratch, 0, kFresh,
      2,                               // 31 ENTER
      1, 1, 1, kOutput, mine, 2, 2,    // 32 TRANSFER reduce, final: my chunk of both inputs
      rank, kInput, mine, kFresh,
      other, kScratch, 0, kFresh,
      rank, kOutput, mine, kFinal,
      rank, kScratch, 1, kFinal,
      4, 1,                            // 55 PUBLISH round 1
      3, other, 1,                     // 57 WAIT until the other has finished round 1
      1, 0, 1, kOutput, other, 1, 1,   // 60 TRANSFER copy: the other's result
      other, kScratch, 1, kFinal,
      rank, kOutput, other, kFinal,
      0,                               // 75 END
  };
}
// clang-format on

}  // namespace hxcomm::test
