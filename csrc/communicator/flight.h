// What a rank has done last in a group: a ring of records that is read from outside, without the process's help.
//
// It lies in the rank's control page. Written with plain stores to one cache line an operation and no clock reading of
// its own; hxcomm/inspection.py reads it, also of a process that is stopped or stuck, and has the same offsets. A
// record may be torn while it is read; the state is written last.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace hxcomm {

struct Op;

enum class FlightState : uint8_t {
  none = 0,
  posted = 1,  // a collective: at the head of the queue, stages its contribution
  arrived = 2,
  running = 3,  // everybody has arrived
  finished = 4,
  failed = 5,
};

struct alignas(64) FlightRecord {
  uint64_t sequence;  // of the op's first window; 0: a message, or it ended before it had one
  int64_t posted_ns;  // CLOCK_MONOTONIC
  int64_t ended_ns;   // 0: it has not ended
  uint64_t count;     // elements of one block; 0 for unequal all_to_all
  int32_t root;
  uint8_t op, dtype, reduce_op;
  std::atomic<FlightState> state;
  char call_site[24];  // "train.py:41" where HXCOMM_TRACE=callsite
};
static_assert(sizeof(FlightRecord) == 64 && offsetof(FlightRecord, root) == 32 && offsetof(FlightRecord, state) == 39);

struct alignas(64) Flight {
  static constexpr size_t kRecords = 64;
  std::atomic<uint64_t> n_queued;   // collectives that wait for the one before them, or are the head
  std::atomic<uint64_t> n_records;  // begun so far: messages, and collectives that came to the head of the queue
  std::array<FlightRecord, kRecords> records;  // number i in [i % kRecords]

  // Writes the record of an op, in the state `posted`, and returns its number. Any thread.
  uint64_t open(const Op& op);
  // The record of an op that has not ended; null once 64 others have come after it.
  FlightRecord* at(uint64_t number) {
    return n_records.load(std::memory_order_relaxed) - number > kRecords ? nullptr : &records[number % kRecords];
  }
  void set_state(uint64_t number, FlightState state) {
    if (FlightRecord* record = at(number)) record->state.store(state, std::memory_order_release);
  }
  void close(uint64_t number, bool well, int64_t now_ns);
};
static_assert(offsetof(Flight, n_records) == 8 && offsetof(Flight, records) == 64);

// The ring as JSON text, oldest first: [{"sequence": 3, "op": "all_reduce", ...}, ...]
std::string flight_json(const Flight& flight);

// Text inside double quotes.
std::string json_text(const std::string& text);

}  // namespace hxcomm
