-- Lets a lease end no earlier than asked, and records a new owner.
--
-- Keys: store, spaces, space. Arguments: clock offset, id, a record with the VM and the new owner,
-- lease.
local record = redis.call('HGET', KEYS[3], 'record')
if not record then return { 'absent' } end
if string.sub(record, 1, 16) ~= string.sub(ARGV[3], 1, 16) then return { 'vm' } end
local store = redis.call('GET', KEYS[1])
if not store then return { 'damaged' } end
local lease = math.max(tonumber(ARGV[4]), tonumber(redis.call('HGET', KEYS[3], 'lease') or '0'))
local ends = math.max(now(ARGV[1]) + tonumber(ARGV[4]), tonumber(redis.call('ZSCORE', KEYS[2], ARGV[2]) or '0'))
redis.call('HSET', KEYS[3], 'record', string.sub(record, 1, 17) .. string.sub(ARGV[3], 18))
redis.call('HSET', KEYS[3], 'lease', string.format('%.0f', lease))
redis.call('ZADD', KEYS[2], string.format('%.0f', ends), ARGV[2])
return { 'ok', store }
