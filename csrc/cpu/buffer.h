#pragma once

#include <cstdint>
#include <memory>

// Memory aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_(new char[size + kLine]) {}
  char* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (kLine - address % kLine) % kLine;
  }

 private:
  static constexpr int64_t kLine = 64;
  std::unique_ptr<char[]> memory_;
};
