// What every emulated library has, beside its ops: csrc/cuda's kernels on CPU pointers.
#pragma once
#include "emulator.h"

// what went wrong, or null
template <class Call>
static const char* run(uint64_t seed, const Call& call) {
  static std::string message;
  emulator::machine.random = seed * 2 + 1;
  for (auto& region : emulator::machine.regions) region.count = {};
  try {
    call();
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}

extern "C" {

void clear_regions() {
  emulator::machine.regions.clear();
  emulator::machine.counts.clear();
  emulator::machine.requests.clear();
}

// An allocation: its bytes, and those of an element.
void add_region(const char* name, const void* p, int64_t bytes, int64_t element, bool writable) {
  auto& regions = emulator::machine.regions;
  regions.push_back({name, (const char*)p, (const char*)p + bytes, writable, emulator::Count{}});
  if (writable && bytes <= emulator::kMaxShadowed * element)
    regions.back().shadow.emplace(p, bytes, element);
}

void count_requests(bool counted) { emulator::machine.requests.counted = counted; }

const char* requests() {  // lines of: kernel memory access requests units least
  static std::string text;
  text = emulator::machine.requests.text();
  return text.c_str();
}

const char* counts() {  // lines of: kernel region read written
  static std::string text;
  text.clear();
  for (const auto& [key, count] : emulator::machine.counts)
    text += key.first + " " + key.second + " " + std::to_string(count.read) + " " +
            std::to_string(count.written) + "\n";
  return text.c_str();
}

}  // extern "C"
