// A frame: what processes on different hosts say to each other. A header of fixed size, then a payload of its length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "transport/handshake.h"
#include "transport/zmq_library.h"

namespace hxcomm {

enum class FrameType : uint16_t {
  hello = 1,    // of the wire: who I am, whom I mean; the first frame of a connection, in both directions
  verdict = 2,  // from here on of a group
  descriptors = 3,
  message = 4,
  credit = 5,
  packet = 6,
  abort = 7,
  left = 8,
  window = 9,
};
inline constexpr uint16_t kLastFrameType = 9;

// Little-endian, as every machine that hxcomm runs on. Magic and version stay in front in every version.
struct FrameHeader {
  uint32_t magic = 0;
  uint16_t version = 0;
  FrameType type{};
  uint64_t group = 0;  // nonce of the group; 0: of the wire itself
  uint64_t sequence = 0;
  uint64_t fingerprint = 0;
  uint32_t number = 0;
  int32_t source = -1;  // ranks in the group
  int32_t destination = -1;
  uint32_t payload_bytes = 0;
  uint64_t aux = 0;    // by type: credits given back so far, where in a window, ...
  uint32_t flags = 0;  // by type
  uint32_t crc = 0;    // CRC-32C of all before it
};
static_assert(sizeof(FrameHeader) == 64 && offsetof(FrameHeader, crc) == 60);

inline constexpr uint32_t kFrameMagic = 0x5758'4148;  // "HAXW"
inline constexpr uint16_t kWireVersion = 1;
inline constexpr size_t kMaxPayloadBytes = size_t{4} << 20;

uint32_t crc32c(const void* data, size_t nbytes);
// The CRC that a header should have.
inline uint32_t crc_of(const FrameHeader& header) { return crc32c(&header, offsetof(FrameHeader, crc)); }

// The bytes of a frame: owns a message of libzmq, which may share its memory with others.
class Payload {
 public:
  Payload();                        // none
  explicit Payload(size_t nbytes);  // to be filled
  explicit Payload(ZmqMessage* taken);
  ~Payload();
  Payload(Payload&& other) noexcept;
  Payload& operator=(Payload&& other) noexcept;
  std::byte* data() { return static_cast<std::byte*>(zmq_->msg_data(&message_)); }
  const std::byte* data() const { return static_cast<const std::byte*>(zmq_->msg_data(&message_)); }
  size_t size() const { return zmq_->msg_size(&message_); }
  Payload share() const;  // the same memory
  ZmqMessage* message() { return &message_; }

 private:
  const ZmqLibrary* zmq_;
  mutable ZmqMessage message_;  // libzmq's functions that only look take it without const
};

// A group, to the wire. Called on the thread that pumps, under the wire's lock: neither may call the wire.
class FrameHandler {
 public:
  virtual ~FrameHandler() = default;
  virtual void on_frame(const Nonce& from, const FrameHeader& header, Payload&& payload) = 0;
  // The process will not be heard from again. `why` goes on after its name: "closed its connection (...)".
  virtual void on_lost(const Nonce& process, const std::string& why) = 0;
};

}  // namespace hxcomm
