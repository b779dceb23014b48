#include "transport/frame.h"

#include <array>
#include <new>

namespace hxcomm {
namespace {

constexpr std::array<uint32_t, 256> crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0x82F6'3B78u & (0u - (crc & 1)));
    table[byte] = crc;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kCrcTable = crc_table();

}  // namespace

uint32_t crc32c(const void* data, size_t nbytes) {
  uint32_t crc = ~0u;
  for (const auto* byte = static_cast<const uint8_t*>(data); nbytes > 0; ++byte, --nbytes)
    crc = (crc >> 8) ^ kCrcTable[(crc ^ *byte) & 0xFF];
  return ~crc;
}

Payload::Payload() : zmq_(&ZmqLibrary::load()) { zmq_->msg_init(&message_); }

Payload::Payload(size_t nbytes) : zmq_(&ZmqLibrary::load()) {
  if (zmq_->msg_init_size(&message_, nbytes) != 0) throw std::bad_alloc();
}

Payload::Payload(ZmqMessage* taken) : Payload() { zmq_->msg_move(&message_, taken); }

Payload::~Payload() { zmq_->msg_close(&message_); }

Payload::Payload(Payload&& other) noexcept : zmq_(other.zmq_) {
  zmq_->msg_init(&message_);
  zmq_->msg_move(&message_, &other.message_);
}

Payload& Payload::operator=(Payload&& other) noexcept {
  if (this != &other) zmq_->msg_move(&message_, &other.message_);
  return *this;
}

Payload Payload::share() const {
  Payload copy;
  zmq_->msg_copy(&copy.message_, &message_);
  return copy;
}

}  // namespace hxcomm
