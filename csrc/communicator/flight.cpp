#include "communicator/flight.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "communicator/call.h"

namespace hxcomm {
namespace {

constexpr const char* kStates[] = {"none", "posted", "arrived", "running", "finished", "failed"};

std::string record_json(const FlightRecord& record) {
  const auto op = static_cast<OpCode>(record.op);
  const auto number = [](auto value) { return std::to_string(value); };
  return "{\"sequence\": " + number(record.sequence) + ", \"op\": " + json_text(op_name(op)) +
         ", \"dtype\": " + json_text(dtype_name(static_cast<DType>(record.dtype))) +
         ", \"count\": " + number(record.count) + ", \"reduce_op\": " +
         (reduces(op) ? json_text(reduce_op_name(static_cast<ReduceOp>(record.reduce_op))) : "null") +
         ", \"root\": " + (record.root >= 0 ? number(record.root) : "null") +
         ", \"state\": " + json_text(kStates[static_cast<size_t>(record.state.load(std::memory_order_relaxed))]) +
         ", \"posted_ns\": " + number(record.posted_ns) +
         ", \"ended_ns\": " + (record.ended_ns != 0 ? number(record.ended_ns) : "null") +
         ", \"call_site\": " + json_text({record.call_site, strnlen(record.call_site, sizeof(record.call_site))}) + "}";
}

}  // namespace

std::string json_text(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) {
      quoted += c;
    } else {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
      quoted += escaped;
    }
  }
  return quoted + "\"";
}

uint64_t Flight::open(const Op& op) {
  const uint64_t number = n_records.fetch_add(1, std::memory_order_relaxed);
  FlightRecord& record = records[number % kRecords];
  record.state.store(FlightState::none, std::memory_order_relaxed);
  record.sequence = op.first_sequence;
  record.posted_ns = op.posted_ns;
  record.ended_ns = 0;
  record.count = op.call.count;
  record.root = op.call.root;
  record.op = static_cast<uint8_t>(op.call.op);
  record.dtype = static_cast<uint8_t>(op.call.dtype);
  record.reduce_op = static_cast<uint8_t>(op.call.reduce_op);
  std::memcpy(record.call_site, op.call_site, sizeof(record.call_site));
  record.state.store(FlightState::posted, std::memory_order_release);
  return number;
}

void Flight::close(uint64_t number, bool well, int64_t now_ns) {
  FlightRecord* record = at(number);
  if (record == nullptr) return;
  record->ended_ns = now_ns;
  record->state.store(well ? FlightState::finished : FlightState::failed, std::memory_order_release);
}

std::string flight_json(const Flight& flight) {
  const uint64_t end = flight.n_records.load(std::memory_order_acquire);
  std::string text = "[";
  for (uint64_t i = end - std::min<uint64_t>(end, Flight::kRecords); i < end; ++i)
    text += (text.size() > 1 ? ",\n  " : "") + record_json(flight.records[i % Flight::kRecords]);
  return text + "]";
}

}  // namespace hxcomm
