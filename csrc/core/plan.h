// A plan: one rank's share of a compiled Schedule, decoded from the flat words that hxcomm/schedule/plan.py writes and
// documents. Decoding checks every index, since plans also come from users' own algorithms.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hxcomm {

enum class BufferKind : uint8_t { input = 0, output = 1, scratch = 2, message = 3 };
enum class Mark : uint8_t { fresh = 0, partial = 1, final_ = 2 };

struct Operand {
  int32_t rank;
  BufferKind buffer;
  Mark mark;
  int32_t chunk;
};

struct Instruction {
  enum class Code : uint8_t { end = 0, transfer = 1, enter = 2, wait = 3, publish = 4, receive = 5, agree = 6 };
  Code code;
  bool reduce = false;
  bool final = false;
  bool sends = false;   // transfer: some destination is a message to a rank of another host
  bool stores = false;  // transfer: some destination is an input or output
  BufferKind count_buffer = BufferKind::input;
  int32_t count_chunk = 0;
  int32_t peer = 0;            // wait, receive
  uint32_t round = 0;          // wait, publish
  uint32_t number = 0;         // receive: of the message, among all that this rank receives
  uint32_t first_operand = 0;  // transfer: sources, then destinations, in Plan::operands
  uint16_t n_sources = 0;
  uint16_t n_destinations = 0;
};

// A buffer as a plan sees it: `blocks` memory extents, each cut into `pieces`; chunk = block * pieces + piece.
struct Layout {
  int32_t blocks = 0;
  int32_t pieces = 1;
};

struct Plan {
  int32_t world_size = 0;
  int32_t rank = 0;
  Layout input, output;
  // By rank: how many of its blocks this rank's instructions touch. Of this rank itself fewer than the layout has where
  // the op gives it none (the input of scatter, the output of gather, on ranks that are not the root); of others none
  // where the plan is private.
  std::vector<int32_t> input_blocks, output_blocks;
  int32_t scratch_chunks = 0;
  int32_t messages = 0;  // the most that any rank receives from other hosts
  bool in_place = false;
  bool is_private = false;           // peers touch nothing but this rank's scratch
  bool crosses = false;              // some ranks are on other hosts: messages, and one AGREE
  bool partials = false;             // some scratch chunk holds the accumulation type
  bool moves_contributions = false;  // copies a contribution to an output or input, where it cannot lie multiplied
  uint64_t hash = 0;
  std::string algorithm;
  std::vector<Instruction> instructions;
  std::vector<Operand> operands;
  std::vector<int32_t> words;  // as decoded: what another executor (Python's, a chip's) is handed

  // Throws Error{usage} naming the word that is wrong.
  static Plan decode(std::vector<int32_t> words, uint64_t hash, std::string algorithm);
};

// Elements [begin, end) of one chunk inside its block, for the window [low, high) of a block of `count` elements.
// Pieces are multiples of 16 elements, so that they share neither vectors nor (from 4-byte types up) cache lines.
struct Piece {
  uint64_t begin;
  uint64_t count;
};

inline uint64_t piece_elements(uint64_t window, int32_t pieces) {
  const auto p = static_cast<uint64_t>(pieces);
  return ((window + p - 1) / p + 15) / 16 * 16;
}

inline Piece piece_of(uint64_t count, uint64_t low, uint64_t high, int32_t pieces, int32_t piece) {
  const uint64_t begin = low < count ? low : count;
  const uint64_t window = (high < count ? high : count) - begin;
  if (pieces == 1) return {begin, window};
  const uint64_t each = piece_elements(window, pieces);
  const uint64_t first = each * static_cast<uint64_t>(piece);
  const uint64_t a = first < window ? first : window;
  const uint64_t b = first + each < window ? first + each : window;
  return {begin + a, b - a};
}

}  // namespace hxcomm
