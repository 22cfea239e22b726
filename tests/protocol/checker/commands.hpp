// The commands that Samphire's scripts use, on a keyspace in memory. There is no clock: TIME is constant, and nothing
// expires by itself (that is an action of the model). `conformance.py` compares all of it with a real Valkey.
#pragma once

#include <algorithm>
#include <functional>
#include <unordered_map>

#include "reply.hpp"

using Words = vector<string>;

// The two numbers of a log entry's id.
inline std::pair<long long, long long> place_of(const string& id) {
  return {atoll(id.c_str()), atoll(id.c_str() + id.find('-') + 1)};
}

// A key of another type: what a command raises in a script.
struct WrongType {};

class Commands {
 public:
  Keyspace keys;
  vector<Effect> effects;

  Reply run(const Words& words) {
    string name;
    for (char c : words[0]) name += static_cast<char>(toupper(c));
    auto found = table().find(name);
    if (found == table().end()) {
      fprintf(stderr, "unknown command %s\n", name.c_str());
      exit(3);
    }
    try {
      return (this->*found->second)(words);
    } catch (WrongType&) { return Reply::error("WRONGTYPE Operation against a key holding the wrong kind of value"); }
  }

 private:
  using Handler = Reply (Commands::*)(const Words&);
  static const std::unordered_map<string, Handler>& table();

  Value* find(const string& key) {
    auto found = keys.find(key);
    return found == keys.end() ? nullptr : &found->second;
  }
  Value* get(const string& key, Type type) {
    Value* value = find(key);
    if (value && value->type != type) throw WrongType();
    return value;
  }
  Value& make(const string& key, Type type) {
    Value* value = get(key, type);
    if (!value) {
      value = &keys[key];
      value->type = type;
    }
    return *value;
  }
  void drop_if_empty(const string& key) {
    Value* value = find(key);
    if (value && value->is_empty()) keys.erase(key);
  }
  void set_text(const string& key, const string& text) {
    Value value;
    value.type = Type::text;
    value.text = text;
    keys[key] = value;
  }
  static std::pair<long, long> range(size_t length, const string& first, const string& last) {
    long count = static_cast<long>(length), from = atol(first.c_str()), to = atol(last.c_str());
    if (from < 0) from += count;
    if (to < 0) to += count;
    return {std::max(from, 0L), std::min(to, count - 1)};
  }
  Reply push(const Words& words, bool left) {
    Value& value = make(words[1], Type::list);
    for (size_t n = 2; n < words.size(); n++) {
      if (left)
        value.list.push_front(words[n]);
      else
        value.list.push_back(words[n]);
      effects.push_back({left ? 'L' : 'R', words[1], words[n]});
    }
    return Reply::number(value.list.size());
  }

  // any key
  Reply exists(const Words& words) {
    long count = 0;
    for (size_t n = 1; n < words.size(); n++) count += find(words[n]) != nullptr;
    return Reply::number(count);
  }
  Reply type(const Words& words) {
    Value* value = find(words[1]);
    switch (value ? value->type : Type::none) {
      case Type::text: return Reply::status("string");
      case Type::list: return Reply::status("list");
      case Type::hash: return Reply::status("hash");
      case Type::set: return Reply::status("set");
      case Type::sorted: return Reply::status("zset");
      case Type::stream: return Reply::status("stream");
      default: return Reply::status("none");
    }
  }
  Reply del(const Words& words) {
    long count = 0;
    for (size_t n = 1; n < words.size(); n++) count += static_cast<long>(keys.erase(words[n]));
    return Reply::number(count);
  }
  Reply expire(const Words& words) { return Reply::number(find(words[1]) != nullptr); }
  Reply rename(const Words& words) {
    Value value = keys.at(words[1]);
    keys.erase(words[1]);
    keys[words[2]] = value;
    return Reply::status("OK");
  }
  // the server
  Reply time(const Words&) {
    Reply reply = Reply::array();
    reply.items = {Reply::bulk("1000"), Reply::bulk("0")};
    return reply;
  }
  Reply info(const Words&) { return Reply::bulk("used_memory:1\r\nmaxmemory:0\r\n"); }
  Reply publish(const Words& words) {
    effects.push_back({'P', words[1], words[2]});
    return Reply::number(0);
  }
  // strings
  Reply get_text(const Words& words) {
    Value* value = get(words[1], Type::text);
    return value ? Reply::bulk(value->text) : Reply::nothing();
  }
  Reply mget(const Words& words) {
    Reply reply = Reply::array();
    for (size_t n = 1; n < words.size(); n++) {
      Value* value = find(words[n]);
      reply.items.push_back(value && value->type == Type::text ? Reply::bulk(value->text) : Reply::nothing());
    }
    return reply;
  }
  Reply set(const Words& words) {
    bool only_new = std::find(words.begin() + 3, words.end(), "NX") != words.end();
    if (only_new && find(words[1])) return Reply::nothing();
    set_text(words[1], words[2]);
    return Reply::status("OK");
  }
  Reply setex(const Words& words) {
    set_text(words[1], words[3]);
    return Reply::status("OK");
  }
  Reply mset(const Words& words) {
    for (size_t n = 1; n + 1 < words.size(); n += 2) set_text(words[n], words[n + 1]);
    return Reply::status("OK");
  }
  Reply incr(const Words& words) {
    Value& value = make(words[1], Type::text);
    value.text = std::to_string(atol(value.text.c_str()) + 1);
    return Reply::number(atol(value.text.c_str()));
  }
  // lists
  Reply llen(const Words& words) {
    Value* value = get(words[1], Type::list);
    return Reply::number(value ? value->list.size() : 0);
  }
  Reply lpush(const Words& words) { return push(words, true); }
  Reply rpush(const Words& words) { return push(words, false); }
  Reply lrange(const Words& words) {
    Reply reply = Reply::array();
    Value* value = get(words[1], Type::list);
    if (!value) return reply;
    auto [from, to] = range(value->list.size(), words[2], words[3]);
    for (long n = from; n <= to; n++) reply.items.push_back(Reply::bulk(value->list[n]));
    return reply;
  }
  Reply ltrim(const Words& words) {
    Value* value = get(words[1], Type::list);
    if (!value) return Reply::status("OK");
    auto [from, to] = range(value->list.size(), words[2], words[3]);
    std::deque<string> kept;
    for (long n = from; n <= to; n++) kept.push_back(value->list[n]);
    value->list = kept;
    drop_if_empty(words[1]);
    return Reply::status("OK");
  }
  // hashes
  Reply hget(const Words& words) {
    Value* value = get(words[1], Type::hash);
    auto found = value ? value->hash.find(words[2]) : std::map<string, string>::iterator();
    return value && found != value->hash.end() ? Reply::bulk(found->second) : Reply::nothing();
  }
  Reply hmget(const Words& words) {
    Reply reply = Reply::array();
    for (size_t n = 2; n < words.size(); n++) reply.items.push_back(hget({"HGET", words[1], words[n]}));
    return reply;
  }
  Reply hset(const Words& words) {
    Value& value = make(words[1], Type::hash);
    long fresh = 0;
    for (size_t n = 2; n + 1 < words.size(); n += 2) {
      fresh += !value.hash.count(words[n]);
      value.hash[words[n]] = words[n + 1];
    }
    return Reply::number(fresh);
  }
  Reply hdel(const Words& words) {
    Value* value = get(words[1], Type::hash);
    long gone = 0;
    for (size_t n = 2; value && n < words.size(); n++) gone += static_cast<long>(value->hash.erase(words[n]));
    drop_if_empty(words[1]);
    return Reply::number(gone);
  }
  Reply hlen(const Words& words) {
    Value* value = get(words[1], Type::hash);
    return Reply::number(value ? value->hash.size() : 0);
  }
  Reply hstrlen(const Words& words) { return Reply::number(hget(words).text.size()); }
  Reply hexists(const Words& words) {
    Value* value = get(words[1], Type::hash);
    return Reply::number(value && value->hash.count(words[2]));
  }
  Reply hkeys(const Words& words) {
    Reply reply = Reply::array();
    if (Value* value = get(words[1], Type::hash))
      for (const auto& [field, item] : value->hash) reply.items.push_back(Reply::bulk(field));
    return reply;
  }
  Reply hvals(const Words& words) {
    Reply reply = Reply::array();
    if (Value* value = get(words[1], Type::hash))
      for (const auto& [field, item] : value->hash) reply.items.push_back(Reply::bulk(item));
    return reply;
  }
  Reply hrandfield(const Words& words) { return hkeys(words); }  // there are never more here than are asked for
  Reply hincrby(const Words& words) {
    string& number = make(words[1], Type::hash).hash[words[2]];
    number = std::to_string(atol(number.c_str()) + atol(words[3].c_str()));
    return Reply::number(atol(number.c_str()));
  }
  // sets
  Reply sadd(const Words& words) {
    Value& value = make(words[1], Type::set);
    long fresh = 0;
    for (size_t n = 2; n < words.size(); n++) fresh += value.set.insert(words[n]).second;
    return Reply::number(fresh);
  }
  Reply srem(const Words& words) {
    Value* value = get(words[1], Type::set);
    long gone = 0;
    for (size_t n = 2; value && n < words.size(); n++) gone += static_cast<long>(value->set.erase(words[n]));
    drop_if_empty(words[1]);
    return Reply::number(gone);
  }
  Reply smismember(const Words& words) {
    Value* value = get(words[1], Type::set);
    Reply reply = Reply::array();
    for (size_t n = 2; n < words.size(); n++) reply.items.push_back(Reply::number(value && value->set.count(words[n])));
    return reply;
  }
  Reply scard(const Words& words) {
    Value* value = get(words[1], Type::set);
    return Reply::number(value ? value->set.size() : 0);
  }
  Reply smembers(const Words& words) {
    Reply reply = Reply::array();
    if (Value* value = get(words[1], Type::set))
      for (const auto& item : value->set) reply.items.push_back(Reply::bulk(item));
    return reply;
  }
  // sorted sets
  Reply zcard(const Words& words) {
    Value* value = get(words[1], Type::sorted);
    return Reply::number(value ? value->sorted.size() : 0);
  }
  Reply zadd(const Words& words) {
    Value& value = make(words[1], Type::sorted);
    bool fresh = !value.sorted.count(words[3]);
    value.sorted[words[3]] = atof(words[2].c_str());
    return Reply::number(fresh);
  }
  Reply zrem(const Words& words) {
    Value* value = get(words[1], Type::sorted);
    long gone = 0;
    for (size_t n = 2; value && n < words.size(); n++) gone += static_cast<long>(value->sorted.erase(words[n]));
    drop_if_empty(words[1]);
    return Reply::number(gone);
  }
  Reply zscore(const Words& words) {
    Value* value = get(words[1], Type::sorted);
    if (!value || !value->sorted.count(words[2])) return Reply::nothing();
    return Reply::bulk(number_text(value->sorted[words[2]]));
  }
  Reply zmscore(const Words& words) {
    Reply reply = Reply::array();
    for (size_t n = 2; n < words.size(); n++) reply.items.push_back(zscore({"ZSCORE", words[1], words[n]}));
    return reply;
  }
  Reply zrange(const Words& words) {  // only: key -inf <maximum> BYSCORE LIMIT 0 <count>
    Reply reply = Reply::array();
    Value* value = get(words[1], Type::sorted);
    if (!value) return reply;
    vector<std::pair<double, string>> found;
    for (const auto& [member, score] : value->sorted)
      if (score <= atof(words[3].c_str())) found.push_back({score, member});
    std::sort(found.begin(), found.end());
    size_t most = std::min(found.size(), static_cast<size_t>(atol(words[7].c_str())));
    for (size_t n = 0; n < most; n++) reply.items.push_back(Reply::bulk(found[n].second));
    return reply;
  }
  Reply zremrangebyscore(const Words& words) {  // only from -inf
    Value* value = get(words[1], Type::sorted);
    if (!value) return Reply::number(0);
    size_t before = value->sorted.size();
    double maximum = atof(words[3].c_str());
    for (auto at = value->sorted.begin(); at != value->sorted.end();)
      at = at->second <= maximum ? value->sorted.erase(at) : std::next(at);
    long gone = static_cast<long>(before - value->sorted.size());
    drop_if_empty(words[1]);
    return Reply::number(gone);
  }
  Reply zremrangebyrank(const Words&) { return Reply::number(0); }  // there are never that many here
  // streams
  Reply xadd(const Words& words) {  // only: key MAXLEN ~ <count> <* or id> <field> <value> …
    bool has_id = words[5] != "*";  // an entry of a log begins with its id
    vector<string> entry(words.begin() + (has_id ? 5 : 6), words.end());
    auto& stream = make(words[1], Type::stream).stream;
    if (has_id && !stream.empty() && place_of(words[5]) <= place_of(stream.back()[0])) {
      effects.push_back({'!', words[1], words[5]});
      return Reply::error("ERR The ID specified in XADD is equal or smaller than the target stream top item");
    }
    stream.push_back(entry);
    if (!has_id) effects.push_back({'X', entry[0], entry[1]});
    return Reply::bulk(has_id ? words[5] : "1-1");
  }
  static Reply entry_of(const vector<string>& entry) {
    Reply fields = Reply::array(), both = Reply::array();
    for (size_t n = 1; n < entry.size(); n++) fields.items.push_back(Reply::bulk(entry[n]));
    both.items = {Reply::bulk(entry[0]), fields};
    return both;
  }
  Reply xrange(const Words& words) {  // only: key <id> <the same id>
    Reply reply = Reply::array();
    if (Value* value = get(words[1], Type::stream))
      for (const auto& entry : value->stream)
        if (entry[0] == words[2]) reply.items.push_back(entry_of(entry));
    return reply;
  }
  Reply xrevrange(const Words& words) {  // only: key + - COUNT 1
    Reply reply = Reply::array();
    if (Value* value = get(words[1], Type::stream))
      if (!value->stream.empty()) reply.items.push_back(entry_of(value->stream.back()));
    return reply;
  }
};

inline const std::unordered_map<string, Commands::Handler>& Commands::table() {
  using C = Commands;
  static const std::unordered_map<string, Handler> handlers = {{"EXISTS", &C::exists},
                                                               {"TYPE", &C::type},
                                                               {"DEL", &C::del},
                                                               {"UNLINK", &C::del},
                                                               {"EXPIRE", &C::expire},
                                                               {"PEXPIRE", &C::expire},
                                                               {"RENAME", &C::rename},
                                                               {"TIME", &C::time},
                                                               {"INFO", &C::info},
                                                               {"PUBLISH", &C::publish},
                                                               {"GET", &C::get_text},
                                                               {"MGET", &C::mget},
                                                               {"SET", &C::set},
                                                               {"SETEX", &C::setex},
                                                               {"MSET", &C::mset},
                                                               {"INCR", &C::incr},
                                                               {"LLEN", &C::llen},
                                                               {"LPUSH", &C::lpush},
                                                               {"RPUSH", &C::rpush},
                                                               {"LRANGE", &C::lrange},
                                                               {"LTRIM", &C::ltrim},
                                                               {"HGET", &C::hget},
                                                               {"HMGET", &C::hmget},
                                                               {"HSET", &C::hset},
                                                               {"HDEL", &C::hdel},
                                                               {"HLEN", &C::hlen},
                                                               {"HSTRLEN", &C::hstrlen},
                                                               {"HEXISTS", &C::hexists},
                                                               {"HKEYS", &C::hkeys},
                                                               {"HVALS", &C::hvals},
                                                               {"HINCRBY", &C::hincrby},
                                                               {"HRANDFIELD", &C::hrandfield},
                                                               {"SADD", &C::sadd},
                                                               {"SREM", &C::srem},
                                                               {"SCARD", &C::scard},
                                                               {"SMISMEMBER", &C::smismember},
                                                               {"SMEMBERS", &C::smembers},
                                                               {"ZCARD", &C::zcard},
                                                               {"ZADD", &C::zadd},
                                                               {"ZREM", &C::zrem},
                                                               {"ZSCORE", &C::zscore},
                                                               {"ZMSCORE", &C::zmscore},
                                                               {"ZRANGE", &C::zrange},
                                                               {"ZREMRANGEBYSCORE", &C::zremrangebyscore},
                                                               {"ZREMRANGEBYRANK", &C::zremrangebyrank},
                                                               {"XADD", &C::xadd},
                                                               {"XRANGE", &C::xrange},
                                                               {"XREVRANGE", &C::xrevrange}};
  return handlers;
}
