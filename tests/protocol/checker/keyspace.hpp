// A keyspace in memory: what a Redis or Valkey database holds, with a canonical form to compare it by and to keep it
// in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

using std::string;
using std::vector;

enum class Type : char { none = 0, text = 's', list = 'l', hash = 'h', set = 'e', sorted = 'z', stream = 'x' };

struct Value {
  Type type = Type::none;
  string text;
  std::deque<string> list;
  std::map<string, string> hash;
  std::set<string> set;
  std::map<string, double> sorted;
  vector<vector<string>> stream;

  bool is_empty() const {  // a key whose last element goes, goes too; but for a stream
    switch (type) {
      case Type::list: return list.empty();
      case Type::hash: return hash.empty();
      case Type::set: return set.empty();
      case Type::sorted: return sorted.empty();
      default: return false;
    }
  }
};

using Keyspace = std::map<string, Value>;

inline string number_text(double number) {
  char buffer[64];
  if (number == static_cast<double>(static_cast<long long>(number)) && std::fabs(number) < 1e17)
    snprintf(buffer, sizeof buffer, "%lld", static_cast<long long>(number));
  else
    snprintf(buffer, sizeof buffer, "%.17g", number);
  return buffer;
}

// ---- the canonical form: one string a keyspace, so that equal keyspaces are kept once

inline void put_count(string& out, size_t count) {
  auto narrow = static_cast<uint32_t>(count);
  out.append(reinterpret_cast<char*>(&narrow), sizeof narrow);
}

inline void put_text(string& out, const string& text) {
  put_count(out, text.size());
  out += text;
}

inline string freeze(const Keyspace& keys) {
  string out;
  for (const auto& [key, value] : keys) {
    put_text(out, key);
    out += static_cast<char>(value.type);
    switch (value.type) {
      case Type::none: break;
      case Type::text: put_text(out, value.text); break;
      case Type::list:
        put_count(out, value.list.size());
        for (const auto& item : value.list) put_text(out, item);
        break;
      case Type::hash:
        put_count(out, value.hash.size());
        for (const auto& [field, item] : value.hash) put_text(out, field), put_text(out, item);
        break;
      case Type::set:
        put_count(out, value.set.size());
        for (const auto& item : value.set) put_text(out, item);
        break;
      case Type::sorted:
        put_count(out, value.sorted.size());
        for (const auto& [member, score] : value.sorted) put_text(out, member), put_text(out, number_text(score));
        break;
      case Type::stream:
        put_count(out, value.stream.size());
        for (const auto& entry : value.stream) {
          put_count(out, entry.size());
          for (const auto& part : entry) put_text(out, part);
        }
        break;
    }
  }
  return out;
}

class Thaw {
 public:
  explicit Thaw(const string& frozen) : frozen_(frozen) {}

  Keyspace keys() {
    Keyspace keys;
    while (at_ < frozen_.size()) {
      string key = text();
      keys.emplace(key, value());
    }
    return keys;
  }

 private:
  uint32_t count() {
    uint32_t number;
    memcpy(&number, frozen_.data() + at_, sizeof number);
    at_ += sizeof number;
    return number;
  }

  string text() {
    uint32_t length = count();
    at_ += length;
    return frozen_.substr(at_ - length, length);
  }

  Value value() {
    Value value;
    value.type = static_cast<Type>(frozen_[at_++]);
    if (value.type == Type::text) {
      value.text = text();
      return value;
    }
    for (uint32_t left = count(); left > 0; left--) element(value);
    return value;
  }

  void element(Value& value) {
    switch (value.type) {
      case Type::list: value.list.push_back(text()); break;
      case Type::hash: {
        string field = text();
        value.hash[field] = text();
        break;
      }
      case Type::set: value.set.insert(text()); break;
      case Type::sorted: {
        string member = text();
        value.sorted[member] = atof(text().c_str());
        break;
      }
      case Type::stream: {
        vector<string> entry;
        for (uint32_t left = count(); left > 0; left--) entry.push_back(text());
        value.stream.push_back(entry);
        break;
      }
      default: break;
    }
  }

  const string& frozen_;
  size_t at_ = 0;
};

// ---- as JSON, for the conformance check: bytes are written as code points

inline string json_text(const string& text) {
  string out = "\"";
  char buffer[8];
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 32 || c > 126) {
      snprintf(buffer, sizeof buffer, "\\u%04x", c);
      out += buffer;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + "\"";
}

template <typename Items, typename Write>
string json_items(const Items& items, char open, char close, Write write) {
  string out(1, open);
  for (const auto& item : items) {
    if (out.size() > 1) out += ",";
    out += write(item);
  }
  return out + close;
}

inline string json_value(const Value& value) {
  auto pair = [](const auto& item) { return json_text(item.first) + ":" + json_text(item.second); };
  auto score = [](const auto& item) { return json_text(item.first) + ":" + number_text(item.second); };
  auto entry = [](const auto& item) { return json_items(item, '[', ']', json_text); };
  switch (value.type) {
    case Type::list: return json_items(value.list, '[', ']', json_text);
    case Type::hash: return json_items(value.hash, '{', '}', pair);
    case Type::set: return json_items(value.set, '[', ']', json_text);
    case Type::sorted: return json_items(value.sorted, '{', '}', score);
    case Type::stream: return json_items(value.stream, '[', ']', entry);
    default: return json_text(value.text);
  }
}

inline string json_keys(const Keyspace& keys) {
  return json_items(keys, '{', '}', [](const auto& item) {
    string type(1, static_cast<char>(item.second.type));
    return json_text(item.first) + ":{\"t\":\"" + type + "\",\"v\":" + json_value(item.second) + "}";
  });
}
